"""Normalisation as diagonal layers: the same function, for every spelling; nothing else is touched."""

import operator

import pytest
import torch
from torch import Tensor, nn

from certifiers.elementwise import constants_as_layers, diagonal_layer


class Elementwise(nn.Module):
    """An operation in front of a convolution, with per-channel buffers at hand."""

    def __init__(self, operation, dims: int = 4) -> None:
        super().__init__()
        shape = (3, 1, 1) if dims == 4 else (3,)
        self.register_buffer("mean", torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64).view(shape))
        self.register_buffer("std", torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64).view(shape))
        self.operation = operation
        self.layer = (nn.Conv2d(3, 2, 3) if dims == 4 else nn.Linear(3, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.operation(self, x))


SPELLINGS = {
    "normalise": lambda m, x: (x - m.mean) / m.std,
    "methods": lambda m, x: x.sub(m.mean).div(m.std),
    "functions": lambda m, x: torch.mul(torch.add(x, m.mean), m.std),
    "in place": lambda m, x: operator.itruediv(operator.isub(x + 0.0, m.mean), m.std),
    "numbers": lambda m, x: (x - 0.5) * 2,
    "constant first": lambda m, x: 1 - 3 * x,
    "buffer first": lambda m, x: m.mean - m.std * x,
}


@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_becomes_one_layer(spelling, dims):
    x = torch.rand(5, 3, *[6] * (dims - 2), dtype=torch.float64)
    model = Elementwise(SPELLINGS[spelling], dims).eval()
    rewritten = constants_as_layers(model, x)
    kind = nn.Conv2d if dims == 4 else nn.Linear
    assert len([m for m in rewritten.modules() if isinstance(m, kind)]) == 2
    assert not [n for n in rewritten.graph.nodes if n.op in ("call_function", "call_method")]
    assert torch.allclose(rewritten(x), model(x), rtol=1e-13, atol=1e-13)
    assert not rewritten.training


def test_parameters_are_shared_and_the_new_ones_stay_fixed():
    model = Elementwise(SPELLINGS["normalise"]).eval()
    rewritten = constants_as_layers(model, torch.rand(1, 3, 6, 6, dtype=torch.float64))
    assert rewritten.layer.weight is model.layer.weight
    trained = [p for p in rewritten.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    "operation",
    [
        lambda m, x: x,
        lambda m, x: x * x,
        lambda m, x: torch.add(x, m.mean, alpha=2),
        lambda m, x: x + x.flip(1),
    ],
)
def test_anything_else_is_left_alone(operation):
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    model = Elementwise(operation).eval()
    rewritten = constants_as_layers(model, x)
    assert torch.equal(rewritten(x), model(x))
    assert len([m for m in rewritten.modules() if isinstance(m, nn.Conv2d)]) == 1


def test_a_quotient_by_the_input_is_no_scale():
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64) + 0.5
    model = Elementwise(lambda m, x: m.std / x).eval()
    assert torch.equal(constants_as_layers(model, x)(x), model(x))


def test_a_scale_by_position_is_left_alone():
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    model = Elementwise(lambda m, x: x * m.position)
    model.register_buffer("position", torch.rand(6, 6, dtype=torch.float64))
    rewritten = constants_as_layers(model.eval(), x)
    assert torch.equal(rewritten(x), model(x))


def test_a_trained_scale_keeps_its_gradient():
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    model = Elementwise(lambda m, x: x * m.scale)
    model.scale = nn.Parameter(torch.rand(3, 1, 1, dtype=torch.float64))
    constants_as_layers(model.eval(), x)(x).sum().backward()
    assert model.scale.grad is not None


def test_a_value_used_twice_is_kept():
    """x - mean feeds both the quotient and the sum."""

    def operation(m, x):
        centred = x - m.mean
        return centred / m.std + centred

    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    model = Elementwise(operation).eval()
    assert torch.allclose(constants_as_layers(model, x)(x), model(x), rtol=1e-13, atol=1e-13)


def test_what_cannot_be_traced_comes_back_as_it_is():
    model = Elementwise(lambda m, x: x - m.mean if x.sum() > 0 else x).eval()
    assert constants_as_layers(model, torch.rand(1, 3, 6, 6, dtype=torch.float64)) is model


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3, 3)])
def test_diagonal_layer_is_the_identity_by_default(shape):
    x = torch.rand(shape)
    layer = diagonal_layer(shape, x)
    assert torch.equal(layer(x), x)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("shape", [(4, 5, 3), (4,), (4, 5000)])
def test_diagonal_layer_refuses_other_shapes(shape):
    assert diagonal_layer(shape, torch.zeros(1)) is None
