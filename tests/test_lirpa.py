"""auto_LiRPA's bounds by hand, their gradients and errors; the model and the process stay as they were."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from certifiers.errors import InputError, UnsupportedLayer
from certifiers.lirpa import METHODS, margin_lower_bounds_lirpa
from certifiers.threat import L2Ball, LinfBall
from tests.attacked import DOUBLE, Calls, behind
from tests.nets import NETS, images


def linear(weight, bias) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data = torch.tensor(weight)
    layer.bias.data = torch.tensor(bias)
    return layer


def test_a_linear_network_by_hand():
    """Margin 0 over 1 is 3 a - b + 0.5: its least value is at the corner of the box, cut to [0, 1]."""
    model = linear([[1.0, -2.0], [-2.0, -1.0], [0.0, 0.0]], [0.5, 0.0, 0.0]).eval()
    x, y = torch.tensor([[0.5, 0.95]]), torch.tensor([0])
    for method in METHODS:
        linf = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.1), method)
        # Against 1: 3 * 0.4 - 1.0 + 0.5, for the box is [0.4, 0.6] x [0.85, 1]; against 2: 0.4 - 2.0 + 0.5.
        assert linf.tolist()[0] == pytest.approx([0.0, 0.7, -1.1], abs=1e-6)
        l2 = margin_lower_bounds_lirpa(model, x, y, L2Ball(0.1), method)
        # Without the cut: the clean margin less eps times the norm of the row.
        assert l2.tolist()[0] == pytest.approx([0.0, 1.05 - 0.1 * 10**0.5, -0.9 - 0.1 * 5**0.5], abs=1e-6)


def test_one_relu_by_hand():
    """h = relu(x - 0.5) over [0.3, 0.6]: IBP has [0, 0.1]; CROWN's line above is (x - 0.3) / 3, below 0."""
    model = nn.Sequential(linear([[1.0]], [-0.5]), nn.ReLU(), linear([[-1.0], [2.0]], [1.0, 0.0])).eval()
    x, y = torch.tensor([[0.45]]), torch.tensor([0])
    for method in ("ibp", "crown-ibp", "crown"):
        # Margin 1 - 3 h; both have h <= 0.1 at the upper end.
        bound = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.15), method).detach()
        assert bound[0].tolist() == pytest.approx([0.0, 0.7], abs=1e-6)
    # Label 1: margin 3 h - 1. |lower| > upper, so CROWN's lower line is 0; alpha cannot do better than 0 here.
    for method in METHODS:
        bound = margin_lower_bounds_lirpa(model, x, torch.tensor([1]), LinfBall(0.15), method).detach()
        assert bound[0].tolist() == pytest.approx([-1.0, 0.0], abs=1e-6)


def test_slopes_are_optimised():
    """alpha-CROWN starts from CROWN's slopes and only gains; more iterations gain more."""
    model = NETS["mlp"](dtype=DOUBLE)
    x, y = images(dtype=DOUBLE)
    crown = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.1), "crown")
    few = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.1), "alpha-crown", iterations=2)
    many = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.1), "alpha-crown", iterations=20)
    assert many.mean() > few.mean() > crown.mean()
    assert (many >= crown - 1e-9).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method):
    model = NETS["bn"]()
    model.insert(3, nn.Dropout(0.5))
    model.eval()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model)
    x, y = images(3)
    margin_lower_bounds_lirpa(model, x, y, LinfBall(0.02), method, iterations=3)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert not any(m.training for m in model.modules())
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad and p.grad is None
    for p, q in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("name", NETS)
def test_slopes_are_optimised_whatever_is_unstable(name, eps):
    """auto_LiRPA 0.3 stops on residual networks, and where nearly all units of a layer are unstable."""
    x, y = images()
    alpha = margin_lower_bounds_lirpa(NETS[name](), x, y, LinfBall(eps), "alpha-crown", iterations=3)
    crown = margin_lower_bounds_lirpa(NETS[name](), x, y, LinfBall(eps), "crown")
    assert (alpha >= crown - 1e-5 * crown.abs().max()).all()


def test_gradients_are_those_of_the_bound():
    """Against a finite difference; alpha-CROWN comes back detached."""
    model = NETS["conv"](dtype=DOUBLE)
    x, y = images(2, dtype=DOUBLE)
    weight = model[2].weight
    direction = torch.randn_like(weight)
    for method in ("ibp", "crown-ibp", "crown"):
        model.zero_grad()
        margin_lower_bounds_lirpa(model, x, y, LinfBall(0.05), method).sum().backward()
        expected = (weight.grad * direction).sum()
        values = []
        for step in (1e-6, -1e-6):
            other = copy.deepcopy(model)
            other[2].weight.data += step * direction
            values.append(margin_lower_bounds_lirpa(other, x, y, LinfBall(0.05), method).sum().detach())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected.item(), rel=1e-5)
    assert not margin_lower_bounds_lirpa(model, x, y, LinfBall(0.05), "alpha-crown", 2).requires_grad


def test_no_gradients_where_none_are_wanted():
    model = NETS["mlp"]()
    x, y = images(2)
    with torch.no_grad():
        for method in METHODS:
            assert not margin_lower_bounds_lirpa(model, x, y, LinfBall(0.05), method, 2).requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_eps_zero_gives_the_clean_margins(method):
    model = NETS["residual"](dtype=DOUBLE)
    x, y = images(3, dtype=DOUBLE)
    logits = model(x)
    margins = logits.gather(1, y[:, None]) - logits
    bound = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.0), method, iterations=2)
    assert torch.allclose(bound, margins, atol=1e-9)


def test_quiet_and_global_settings_kept(capfd):
    model = NETS["mlp"](dtype=DOUBLE)
    x, y = images(3, dtype=DOUBLE)
    margin_lower_bounds_lirpa(model, x, y, LinfBall(0.001), "alpha-crown", iterations=60)  # stops early, and says so
    assert capfd.readouterr() == ("", "")
    assert torch.get_default_dtype() == torch.float32
    assert not [n for n, m in sys.modules.items() if n.startswith("auto_LiRPA") and "print" in vars(m)]


def test_no_inputs_no_bounds():
    x, y = images(3)
    assert margin_lower_bounds_lirpa(NETS["mlp"](), x[:0], y[:0], LinfBall(0.1)).shape == (0, 10)


@pytest.mark.parametrize(
    ("first", "names"),
    [
        (Calls(lambda x: torch.erfinv(x * 0.5)), "erfinv"),
        (Calls(lambda x: x if x.sum() > 0 else -x), "branches"),
        (Calls(lambda x: -x if 0.3 < x.mean().item() < 0.4 else x), "takes a number out of a tensor"),
        (Calls(lambda x: x * (float(x.sum()) - 0.3)), "takes a number out of a tensor"),
        (Calls(lambda x: x * x.flatten().tolist()[0]), "takes a number out of a tensor"),
    ],
)
def test_an_unsupported_layer_is_named(first, names):
    x, y = images(2, dtype=DOUBLE)
    with pytest.raises(UnsupportedLayer, match=names) as caught:
        margin_lower_bounds_lirpa(behind(first), x, y % 4, LinfBall(0.1), "crown")
    assert "\n" not in str(caught.value)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "best"}, "methods here are ibp, crown-ibp, crown, alpha-crown"),
        ({"iterations": 0}, "at least one iteration"),
        ({"lr": 0.0}, "step size above 0"),
        ({"y": torch.tensor([0, 10])}, "Labels must be from 0 to 9"),
        ({"x": torch.full((2, 1, 8, 8), 1.5)}, "range from 1.5"),
        ({"train": True}, "training mode"),
        ({"parametrize": True}, "parametrized weights"),
    ],
)
def test_what_a_caller_can_mend(change, message):
    model = NETS["mlp"]().train(change.pop("train", False))
    if change.pop("parametrize", False):
        parametrize.register_parametrization(model[1], "weight", Half())
    x, y = images(2)
    arguments = {"model": model, "x": x, "y": y, "threat": LinfBall(0.1)} | change
    with pytest.raises(InputError, match=message):
        margin_lower_bounds_lirpa(**arguments)


def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    from certifiers.bridges import import_auto_lirpa

    bounded = import_auto_lirpa().BoundedModule
    original = bounded.forward
    monkeypatch.setattr(bounded, "forward", lambda self, *x, **k: original(self, *x, **k) + 1)
    x, y = images(2)
    with pytest.raises(UnsupportedLayer, match="other logits"):
        margin_lower_bounds_lirpa(NETS["mlp"](), x, y, LinfBall(0.1))
