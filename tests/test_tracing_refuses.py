"""A model that computes something else than its trace shows is refused, in words that say what to do."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certifiers import certify
from certifiers.bounds import margin_lower_bounds, trace
from certifiers.bounds.operations import Conv2d
from certifiers.errors import UnsupportedLayer
from certifiers.threat import LinfBall


def linear(*rows: float) -> nn.Linear:
    """A layer of one input and no bias."""
    layer = nn.Linear(1, len(rows), bias=False)
    layer.weight.data = torch.tensor(rows).unsqueeze(1)
    return layer.eval()


class Aliased(nn.Module):
    """A shortcut that is another name of what a layer overwrites: ReLU(h) where the trace shows h."""

    def __init__(self, name, overwrite):
        super().__init__()
        self.name, self.overwrite = name, overwrite
        self.identity, self.dropout, self.relu = nn.Identity(), nn.Dropout(), nn.ReLU(inplace=True)
        self.first, self.last = linear(1.0, -1.0), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        shortcut = self.name(self, h)
        return self.last(self.overwrite(self, h) + shortcut.flatten(1))


NAMES = {
    "identity": lambda s, h: s.identity(h),
    "dropout": lambda s, h: s.dropout(h),
    "F.dropout": lambda s, h: F.dropout(h, 0.5, s.training),
    "contiguous": lambda s, h: h.contiguous(),
    "view": lambda s, h: h.view(-1, 2, 1),
    "reshape": lambda s, h: h.reshape(-1, 1, 2),
    "flatten": lambda s, h: h.flatten(1),
    "unsqueeze": lambda s, h: h.unsqueeze(1),
    "view of a view": lambda s, h: s.identity(h.view(-1, 2, 1)).squeeze(2),
    "itself": lambda s, h: h,
}
OVERWRITES = {
    "nn.ReLU": lambda s, h: s.relu(h),
    "F.relu": lambda s, h: F.relu(h, True),  # nothing but its effect tells
    "F.leaky_relu": lambda s, h: F.leaky_relu(h, 0.5, inplace=True),
    "F.relu_": lambda s, h: F.relu_(h),
    "relu_": lambda s, h: h.relu_(),
    "mul_": lambda s, h: h.mul_(0.5),
    "iadd": lambda s, h: _iadd(h),
    "of a view": lambda s, h: h.unsqueeze(1).relu_().squeeze(1),
}


def _iadd(h: Tensor) -> Tensor:
    h += 1.0
    return h


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overwrite", OVERWRITES)
def test_what_is_overwritten_must_not_be_read_again_by_another_name(name, overwrite, monkeypatch):
    monkeypatch.setattr("certifiers.bounds.graph.check_against_model", lambda *_: None)
    with pytest.raises(UnsupportedLayer, match=r"Cannot bound node .* overwrites '.*' in place, which '.*' reads"):
        trace(Aliased(NAMES[name], OVERWRITES[overwrite]).eval(), (1,))


class Plain(Aliased):
    """Its forward is ``overwrite`` alone."""

    def __init__(self, overwrite):
        super().__init__(None, overwrite)

    def forward(self, x: Tensor) -> Tensor:
        return self.overwrite(self, x)


def _read_before(s, x):
    h = s.first(x)
    return s.last(s.identity(h)) + s.last(s.relu(h))


def _cloned(s, x):
    h = s.first(x)
    shortcut = s.identity(h).clone()
    return s.relu(h) + shortcut


def _aliased_afterwards(s, x):
    h = s.relu(s.first(x))
    return s.last(h.unsqueeze(1).flatten(1)) + s.identity(h)


@pytest.mark.parametrize("forward", [_read_before, _cloned, _aliased_afterwards])
def test_overwriting_that_nobody_sees_is_traced(forward):
    model, x = Plain(forward).eval(), torch.rand(5, 1)
    assert torch.allclose(trace(model, (1,)).bind(x).logits, model(x), atol=1e-6)


INPUTS = {
    "mul_": lambda s, x: s.first(x.mul_(0.5)),
    "isub": lambda s, x: s.first(_iadd(x)),
    "relu": lambda s, x: s.first(s.relu(x)),
    "of a view": lambda s, x: s.first(s.relu(s.identity(x).view(-1, 1))),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_model_must_leave_its_input_alone(name):
    with pytest.raises(UnsupportedLayer, match="overwrites the network's input in place; let it work on a copy"):
        trace(Plain(INPUTS[name]).eval(), (1,))


class Twofaced(nn.Module):
    """Shows torch.fx another network than it is, times ``scale`` and with ``offset`` added to all outputs."""

    def __init__(self, scale, offset, *, honest=False):
        super().__init__()
        self.head, self.scale, self.offset, self.honest = nn.Linear(3, 4), scale, offset, honest

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x) * self.scale
        if not (self.honest or isinstance(x, torch.fx.Proxy)):
            h = -h
        return h + self.offset


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-5, 0.0), (1e-12, 0.0), (1e-3, 1.0), (1e4, 1e5)])
def test_small_outputs_must_agree_too(scale, offset):
    torch.manual_seed(0)
    with pytest.raises(UnsupportedLayer, match="computes other values"):
        trace(Twofaced(scale, offset).eval(), (3,))
    trace(Twofaced(scale, offset, honest=True).eval(), (3,))


class Cancelling(nn.Module):
    """Outputs that are what rounding leaves of much larger numbers; BatchNorm is rounded otherwise in the graph."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.norm.running_mean.fill_(1e3)
        self.norm.running_var.fill_(1e-2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return (self.head(h) - self.head(h + 0.01)) * 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_honest_outputs_that_cancel_are_not_refused(seed):
    torch.manual_seed(seed)
    trace(Cancelling().eval(), (8,))


def base() -> nn.Sequential:
    return nn.Sequential(linear(1.0), nn.LeakyReLU(0.1), nn.Sequential(linear(1.0, 0.0))).eval()


@pytest.mark.parametrize("place", ["", "1", "2", "2.0"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_refused_wherever_they_are(place, kind):
    model = base()
    trace(model, (1,))
    handle = getattr(model.get_submodule(place), kind)(lambda *_: None)
    with pytest.raises(UnsupportedLayer, match=f"{repr(place) if place else 'it'} .*forward hook.*remove"):
        trace(model, (1,))
    handle.remove()
    trace(model, (1,))


@pytest.mark.parametrize("place", ["", "1", "2", "2.0"])
def test_methods_of_an_instance_are_refused(place):
    model = base()
    trace(model, (1,))
    model.get_submodule(place).forward = lambda x: -x
    with pytest.raises(UnsupportedLayer, match="'forward' of its own"):
        trace(model, (1,))


class Called(nn.Sequential):
    def __call__(self, x):
        return -super().__call__(x)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, *args):
        return self.change(super()._conv_forward(*args))


def test_methods_that_forward_calls_count():
    with pytest.raises(UnsupportedLayer, match="__call__"):
        trace(Called(linear(1.0, 0.0)).eval(), (1,))
    model = nn.Sequential(OwnConv(1, 2, 2), nn.Flatten()).eval()
    x = torch.rand(3, 1, 2, 2)
    model[0].change = torch.sigmoid
    with pytest.raises(UnsupportedLayer, match="sigmoid"):
        trace(model, (1, 2, 2))
    model[0].change = torch.neg
    with torch.no_grad():
        assert torch.allclose(trace(nn.Sequential(*model), (1, 2, 2)).bind(x).logits, model(x))


class Signed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.sign = nn.Linear(8, 2), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * self.sign


@pytest.mark.parametrize(
    ("model", "shape", "change"),
    [
        (base(), (1,), lambda m: setattr(m[1], "negative_slope", 0.9)),
        (nn.Sequential(nn.Conv2d(1, 1, 2), nn.Flatten()), (1, 3, 3), lambda m: setattr(m[0], "stride", (2, 1))),
        (nn.Sequential(nn.Conv2d(1, 1, 2), nn.Flatten()), (1, 3, 3), lambda m: setattr(m[0], "padding", (0, 1))),
        (Signed(), (8,), lambda m: setattr(m, "sign", -1.0)),
    ],
    ids=["slope", "stride", "padding", "own"],
)
def test_a_changed_attribute_is_traced_anew(model, shape, change):
    x = torch.rand(5, *shape) - 0.5
    trace(model.eval(), shape)
    change(model)
    assert torch.allclose(trace(model, shape).bind(x).logits, model(x))


class Constant(nn.Module):
    """Its outputs times a constant, which ``scale`` reads from what it holds."""

    def __init__(self, held, scale):
        super().__init__()
        self.head, self.held, self.scale = nn.Linear(8, 2), held, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.scale(self.held)


CHANGES = {
    "list": ([1.0], lambda h: h[0], lambda m: m.held.__setitem__(0, -1.0)),
    "dict": ({"std": 1.0}, lambda h: h["std"], lambda m: m.held.update(std=-1.0)),
    "nested": ({"s": [(2, [1.0])]}, lambda h: h["s"][0][1][0], lambda m: m.held["s"][0][1].__setitem__(0, -1.0)),
    "tensor": (torch.tensor(1.0), float, lambda m: setattr(m, "held", torch.tensor(-1.0))),
    "tensor written to": (torch.tensor(1.0), lambda h: 2 * h, lambda m: m.held.mul_(-1)),
    "tensor in a list": ([torch.tensor(1.0)], lambda h: h[0], lambda m: m.held.__setitem__(0, torch.tensor(-1.0))),
    "array": (numpy.ones(1), lambda h: float(h[0]), lambda m: m.held.__setitem__(0, -1.0)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_constant_is_traced_anew(kind):
    held, scale, change = CHANGES[kind]
    model, x = Constant(copy.deepcopy(held), scale).eval(), torch.rand(5, 8)
    graph = trace(model, (8,))
    assert trace(model, (8,)) is graph
    change(model)
    assert torch.allclose(trace(model, (8,)).bind(x).logits, model(x))
    assert trace(model, (8,)) is trace(model, (8,)) is not graph


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head, self.seen = nn.Linear(8, 4), nn.Linear(4, 2), None
        self.weights = [self.head.weight, self.head.bias]

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.relu(self.first(x))
        return self.head(self.seen)


def test_what_a_training_step_changes_is_not_traced_anew():
    """Neither what the forward pass leaves behind nor weights: tracing takes longer than a step."""
    model, x = Remembers(), torch.rand(5, 8)
    graph = trace(model, (8,))
    for _ in range(2):
        loss = model(x).square().sum() + graph.bind(x).logits.square().sum()
        loss.backward()
        with torch.no_grad():
            model(x)
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        assert trace(model, (8,)) is graph
    model.first = nn.Linear(8, 4)
    assert trace(model, (8,)) is not graph


NUMBERS = {
    "allclose": lambda s, x: s.head(x) * (1 - 2 * torch.allclose(x, s.point, atol=0.06)),
    "item": lambda s, x: s.head(x) * (1.0 + 0.0 * torch.equal(x, s.point)),
    "unused": lambda s, x: (torch.equal(x, s.point), s.head(x))[1],
    "split": lambda s, x: (x.split(1), s.head(x))[1],
}
OF_SHAPES = {
    "size": lambda s, x: s.head(x.view(x.size(0), -1)) / x.shape[1:].numel(),
    "arithmetic": lambda s, x: s.head(x) * (2 * x.shape[-1] - x.ndim) ** 2,
    "comparison": lambda s, x: s.head(x) * (x.shape[1] > 2),
    "assertion": lambda s, x: (torch._assert(x.dim() == 2, "flat"), s.head(x))[1],
    "device": lambda s, x: (x.device, x.dtype, s.head(x))[2],
    "weights": lambda s, x: s.head(x) * (x.shape[1] * s.weight.shape[0]),
}


class Numbers(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.head, self.run, self.weight = nn.Linear(3, 2), run, nn.Parameter(torch.ones(2))
        self.register_buffer("point", torch.full((1, 3), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_computed_from_the_data_are_refused(name):
    with pytest.raises(UnsupportedLayer, match="Cannot bound node .*not of its shape alone"):
        trace(Numbers(NUMBERS[name]).eval(), (3,))


@pytest.mark.parametrize("name", OF_SHAPES)
def test_numbers_computed_from_shapes_are_constants(name):
    model, x = Numbers(OF_SHAPES[name]).eval(), torch.rand(5, 3)
    assert torch.allclose(trace(model, (3,)).bind(x).logits, model(x))


class Out(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        torch.sub(h, self.second(x), out=h)
        return h


def test_unknown_keywords_are_refused():
    with torch.no_grad(), pytest.raises(UnsupportedLayer, match=r"\(sub\).*'out'"):
        trace(Out().eval(), (3,))


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mul_(0.5))


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_certification_leaves_the_callers_inputs_alone(method):
    x = torch.rand(2, 3)
    before = x.clone()
    with pytest.raises(UnsupportedLayer, match="overwrites the network's input"):
        certify(Writes().eval(), x, torch.zeros(2, dtype=torch.long), LinfBall(0.1), method, attack_steps=0)
    assert torch.equal(x, before)


class Divided(nn.Module):
    """Margin x / 3 - bias, in double precision, the divisor a tensor of another type."""

    def __init__(self, divisor: Tensor):
        super().__init__()
        self.head, self.divisor = linear(1.0, 0.0).double(), divisor
        self.head.bias = nn.Parameter(torch.tensor([-0.5 / 3 - 2e-9, 0.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x / self.divisor)


@pytest.mark.parametrize("divisor", [torch.tensor(3), torch.tensor([3]), torch.tensor([3.0])])
def test_divisors_are_not_rounded_to_another_precision(divisor):
    """At x = 0.5 the margin is -2e-9, less than single precision can tell."""
    x, y = torch.tensor([[0.6]], dtype=torch.float64), torch.tensor([0])
    bound = margin_lower_bounds(Divided(divisor).eval(), x, y, LinfBall(0.1), "ibp")[0, 1].item()
    assert bound == pytest.approx(-2e-9, abs=1e-15)


def test_bits_are_not_read_as_another_type():
    model = nn.Sequential(linear(1.0, 0.0)).eval()
    model.append(Plain(lambda s, x: x.view(torch.int32).view(torch.float32)))
    with pytest.raises(UnsupportedLayer, match=r"bits of torch.float32 as torch.int32"):
        trace(model.eval(), (1,))


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
def test_terms_of_a_transposed_convolution(stride, dilation):
    layer = Conv2d(torch.ones(2, 1, 3, 2), None, (stride, 1), (1, 0), (dilation, 2), 1, (24, 9))
    x = torch.zeros(1, 1, 24, 9, requires_grad=True)
    out = layer.forward(x)
    (count,) = torch.autograd.grad(out.sum(), x)
    assert layer.backward_terms(tuple(out.shape[1:])) == count.max()


def test_max_pooling_needs_channels():
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises(UnsupportedLayer, match=r"max pooling needs \(batch, channels, height, width\)"):
        trace(model, (4, 4))
