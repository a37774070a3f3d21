"""Bounds as training uses them: gradients, BatchNorm statistics, masks, memory chunks, torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from certifiers.bounds import (
    METHODS,
    fused_cross_entropy,
    margin_lower_bounds,
    trace,
    worst_case_cross_entropy,
)
from certifiers.bounds.nonlinear import _relu_rows, _ReLURows
from certifiers.errors import InputError
from certifiers.threat import L2Ball, LinfBall
from certprune.masks import materialize, sparsify

from .nets import NETS, images
from .random_nets import SHAPE, random_net

LOSSES = {m: (lambda model, x, y, t, m=m: margin_lower_bounds(model, x, y, t, m)) for m in METHODS}
LOSSES["fused"] = fused_cross_entropy


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("threat", [LinfBall(0.05), L2Ball(0.2)], ids=["linf", "l2"])
def test_gradients_of_inputs_and_weights(name, threat):
    """Against finite differences in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 4),
        nn.LeakyReLU(0.1), nn.Linear(4, 3),
    ).double().eval()  # fmt: skip
    x = (0.3 + 0.4 * torch.rand(2, 1, 3, 3, dtype=torch.float64)).requires_grad_()
    y = torch.tensor([0, 2])
    parameters = dict(model.named_parameters())

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return LOSSES[name](self.model, x, y, threat)

    def bound(x, *values):
        replaced = {f"model.{k}": v for k, v in zip(parameters, values, strict=True)}
        return functional_call(Bound(), replaced, (x,))

    assert torch.autograd.gradcheck(bound, (x, *parameters.values()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("count", [1, 3])
def test_the_written_gradient_of_relu_rows(slope, count):
    torch.manual_seed(count)
    centre, radius = torch.randn(4, 1, 9, dtype=torch.float64), torch.rand(4, 1, 9, dtype=torch.float64)
    rows = torch.randn(4, count, 9, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (rows, centre - radius, centre + radius)]
    outputs = [_ReLURows.apply(*leaves, slope), _relu_rows(*leaves, slope)]
    assert all(torch.equal(ours, plain) for ours, plain in zip(*outputs, strict=True))
    weights = [torch.randn_like(o) for o in outputs[0]]
    gradients = [torch.autograd.grad(out, leaves, weights) for out in outputs]
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("net", NETS)
def test_masked_equals_materialised_and_scores_get_straight_through_gradients(net, name):
    model = NETS[net](seed=2)
    sparsify(model, sparsity=0.7, criterion="score", budget="erk")
    plain = materialize(model)
    x, y = images(4, seed=3)
    masked, dense = (LOSSES[name](m, x, y, LinfBall(0.05)) for m in (model, plain))
    assert torch.equal(masked, dense)
    masked.sum().backward()
    dense.sum().backward()
    layers = [n for n, m in plain.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        masked_layer, effective = model.get_submodule(layer), plain.get_submodule(layer).weight
        scores = next(p for n, p in masked_layer.named_parameters() if n.endswith("scores"))
        weight = masked_layer.parametrizations.weight.original
        assert torch.equal(scores.grad, effective.grad * weight)
        assert scores.grad.abs().sum() > 0


@pytest.mark.parametrize("seed", range(6))
def test_memory_chunks_change_nothing(seed):
    model = random_net(seed, torch.float64)
    x, y = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2])
    whole = margin_lower_bounds(model, x, y, LinfBall(0.1), "crown", memory_mb=1000)
    chunked = margin_lower_bounds(model, x, y, LinfBall(0.1), "crown", memory_mb=0.05)
    assert torch.allclose(whole, chunked, rtol=1e-10, atol=1e-12)


def test_batchnorm_in_training_uses_and_updates_the_clean_statistics():
    model, twin = NETS["bn"](seed=1).train(), NETS["bn"](seed=1).train()
    x, y = images(16, seed=5)
    logits = twin(x)
    network = trace(model, x.shape[1:]).bind(x)
    assert torch.allclose(network.logits, logits, atol=1e-5)
    for (name, ours), (_, reference) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(ours.float(), reference.float(), atol=1e-6), name
    # Bounds of the network with the batch's statistics frozen: at eps 0 they are its margins.
    margins = logits.gather(1, y.unsqueeze(1)) - logits
    for method in METHODS:
        assert torch.allclose(margin_lower_bounds(model, x, y, LinfBall(0.0), method), margins, atol=1e-4)


def test_batchnorm_in_training_without_the_batch_is_an_error():
    with pytest.raises(InputError, match="needs the clean batch"):
        trace(NETS["bn"](seed=1).train(), (1, 8, 8)).bind()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_fused_loss_is_at_least_the_cross_entropy_at_attacked_points(net, trained):
    from certifiers.attack import pgd

    model = NETS[net](seed=6)
    x, y = images(16, seed=6)
    if trained:
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            fused_cross_entropy(model, x, y, LinfBall(0.05)).mean().backward()
            optimizer.step()
    for eps in (0.0, 0.02, 0.1, 1.0):
        threat = LinfBall(eps)
        with torch.no_grad():
            bound = fused_cross_entropy(model, x, y, threat)
        for loss in ("ce", "margin"):
            adversarial = pgd(model, x, y, threat, steps=20, restarts=2, loss=loss, seed=1)
            with torch.no_grad():
                reached = F.cross_entropy(model(adversarial), y, reduction="none")
            assert (bound >= reached - 1e-5 * (1 + reached)).all()


def test_fused_loss_survives_any_logits():
    """Untrained wide nets give bounds in the millions; the loss and its gradient stay finite."""
    for scale in (1e-6, 1.0, 1e2, 1e4):
        model = NETS["conv"](seed=7)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
        x, y = images(8, seed=7)
        loss = fused_cross_entropy(model, x, y, LinfBall(0.3))
        assert torch.isfinite(loss).all()
        loss.mean().backward()  # to 1e16 in the logits
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_fused_loss_equals_the_row_by_row_loss_where_both_are_exact():
    """At eps 0 both are the cross-entropy itself."""
    model = NETS["residual"](seed=8, dtype=torch.float64)
    x, y = images(8, seed=8, dtype=torch.float64)
    reference = F.cross_entropy(model(x), y, reduction="none")
    assert torch.allclose(fused_cross_entropy(model, x, y, LinfBall(0.0)), reference)
    rows = margin_lower_bounds(model, x, y, LinfBall(0.0), "crown-ibp")
    assert torch.allclose(worst_case_cross_entropy(rows, y), reference)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_a_ball_without_a_size_and_of_units_without_weights(name):
    """The norm of zeros has no gradient by itself: a ramp starts at eps 0, and pruning takes whole units away."""
    model = NETS["conv"](seed=3)
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    with torch.no_grad():
        first.weight[0] = 0.0
    x, y = images(4, seed=3)
    for eps in (0.0, 0.1):
        model.zero_grad()
        LOSSES[name](model, x, y, L2Ball(eps)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), eps


def test_compiled_step_equals_the_eager_one():
    """In float64: where a coefficient is zero but for rounding, either of CROWN's lines may be taken."""
    model = NETS["conv"](seed=9, dtype=torch.float64)
    sparsify(model, sparsity=0.5, criterion="score", budget="uniform")
    twin = copy.deepcopy(model)
    x, y = images(8, seed=9, dtype=torch.float64)

    def loss(network, eps):
        return fused_cross_entropy(network, x, y, LinfBall(eps)).mean()

    trace(model, x.shape[1:])
    compiled = torch.compile(lambda eps: loss(model, eps), fullgraph=True)
    for eps in (torch.tensor(0.1).double(), torch.tensor(0.03).double()):
        model.zero_grad()
        twin.zero_grad()
        ours, eager = compiled(eps), loss(twin, eps)
        ours.backward()
        eager.backward()
        assert torch.allclose(ours, eager, rtol=1e-12)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            if q.grad is not None:
                assert (p.grad - q.grad).abs().max() <= 1e-9 * q.grad.abs().max(), name
