"""Every spelling of every supported layer is bounded soundly; everything else is an error that names the node."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certifiers import certify
from certifiers.bounds import METHODS, margin_lower_bounds, trace
from certifiers.errors import InputError, UnsupportedLayer
from certifiers.threat import LinfBall

SHAPE = (2, 6, 6)
PLACES = torch.tensor([40, 3, 70, 7, 12])


class Net(nn.Module):
    """``head(middle(x))`` with a middle written as a function of (self, x)."""

    def __init__(self, middle, **layers: nn.Module):
        super().__init__()
        self.middle = middle
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.register_buffer("mean", torch.tensor([0.3, 0.6]).view(1, 2, 1, 1))
        self.scale = nn.Parameter(torch.tensor([1.5, -0.5]).view(2, 1, 1))
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3))
        with torch.no_grad():
            width = middle(self, torch.zeros(2, *SHAPE)).flatten(1).shape[1]
        self.head = nn.Linear(width, 4)
        self.head_weight = nn.Parameter(torch.randn(4, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, x).flatten(1))


SPELLINGS = {
    "nn.ReLU": (lambda s, x: s.act(s.conv(x)), {"act": nn.ReLU()}),
    "nn.ReLU inplace": (lambda s, x: s.act(s.conv(x)), {"act": nn.ReLU(inplace=True)}),
    "F.relu": (lambda s, x: F.relu(s.conv(x)), {}),
    "torch.relu": (lambda s, x: torch.relu(s.conv(x)), {}),
    "x.relu()": (lambda s, x: s.conv(x).relu(), {}),
    "nn.LeakyReLU": (lambda s, x: s.act(s.conv(x)), {"act": nn.LeakyReLU(0.2)}),
    "F.leaky_relu": (lambda s, x: F.leaky_relu(s.conv(x), 0.3), {}),
    "F.conv2d": (lambda s, x: F.conv2d(x, s.weight, stride=2, padding=1), {}),
    "conv same": (lambda s, x: s.c(x), {"c": nn.Conv2d(2, 3, 3, padding="same", dilation=2)}),
    "conv valid": (lambda s, x: s.c(x), {"c": nn.Conv2d(2, 3, 3, padding="valid", stride=(2, 1))}),
    "conv groups": (lambda s, x: s.c(x), {"c": nn.Conv2d(2, 4, (3, 2), (2, 3), (1, 0), groups=2, bias=False)}),
    "batch norm": (lambda s, x: s.bn(s.conv(x)).relu(), {"bn": nn.BatchNorm2d(3)}),
    "batch norm 1d": (lambda s, x: s.bn(x.flatten(1)).relu(), {"bn": nn.BatchNorm1d(72)}),
    "batch norm plain": (lambda s, x: s.bn(s.conv(x)).relu(), {"bn": nn.BatchNorm2d(3, affine=False)}),
    "F.batch_norm": (lambda s, x: F.batch_norm(x, s.mean[0, :, 0, 0], s.mean[0, :, 0, 0], s.mean[0, :, 0, 0]), {}),
    "nn.AvgPool2d": (lambda s, x: s.p(x.relu()), {"p": nn.AvgPool2d(3, 2, 1)}),
    "avg pool uncounted pad": (lambda s, x: F.avg_pool2d(x, (2, 3), (1, 2), (1, 1), False, False), {}),
    "avg pool ceil": (lambda s, x: F.avg_pool2d(x, 4, 3, ceil_mode=True), {}),
    "nn.AdaptiveAvgPool2d": (lambda s, x: s.p(x), {"p": nn.AdaptiveAvgPool2d((4, None))}),
    "F.adaptive_avg_pool2d": (lambda s, x: F.adaptive_avg_pool2d(s.conv(x), 1), {}),
    "nn.MaxPool2d": (lambda s, x: s.p(s.conv(x)), {"p": nn.MaxPool2d(2)}),
    "max pool overlap": (lambda s, x: F.max_pool2d(s.conv(x), 3, 2, padding=1), {}),
    "max pool ceil": (lambda s, x: F.max_pool2d(s.conv(x), 3, 2, ceil_mode=True), {}),
    "max pool dilated": (lambda s, x: F.max_pool2d(s.conv(x), 2, 1, dilation=2), {}),
    "nn.Flatten": (lambda s, x: s.f(x), {"f": nn.Flatten()}),
    "x.view": (lambda s, x: x.view(x.size(0), -1), {}),
    "x.view fixed": (lambda s, x: x.view(-1, 72), {}),
    "x.reshape": (lambda s, x: x.reshape(x.shape[0], 8, 9), {}),
    "torch.flatten": (lambda s, x: torch.flatten(x, 2), {}),
    "unflatten": (lambda s, x: s.u(x.flatten(1)), {"u": nn.Unflatten(1, (8, 3, 3))}),
    "torch.index_select": (lambda s, x: torch.index_select(s.conv(x).relu().flatten(1), 1, PLACES), {}),
    "x.index_select": (lambda s, x: x.flatten(1).index_select(1, PLACES), {}),
    "squeeze": (lambda s, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), {}),
    "add": (lambda s, x: torch.relu(x) + x, {}),
    "torch.add": (lambda s, x: torch.add(torch.relu(x), x), {}),
    "iadd": (lambda s, x: _iadd(s.conv(x), s.conv(x).relu()), {}),
    "sub": (lambda s, x: torch.relu(x) - x * 2, {}),
    "twice the same": (lambda s, x: x + x, {}),
    "normalise": (lambda s, x: (x - s.mean) / 0.25, {}),
    "scale by parameter": (lambda s, x: s.scale * x, {}),
    "constant minus": (lambda s, x: 1 - x, {}),
    "negation": (lambda s, x: -x, {}),
    "computed constant": (lambda s, x: x + s.mean.abs().sum() * s.mean.view(2, 1, 1), {}),
    "divide by a size": (lambda s, x: x / x.size(1), {}),
    "nn.Dropout": (lambda s, x: s.d(x), {"d": nn.Dropout(0.5)}),
    "F.dropout": (lambda s, x: F.dropout(x, 0.5, s.training), {}),
    "nn.Identity": (lambda s, x: s.i(x), {"i": nn.Identity()}),
    "F.linear": (lambda s, x: F.linear(x.flatten(1), s.mean.flatten().repeat(5, 36)), {}),
    "nested": (lambda s, x: s.n(x), {"n": nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.ReLU()))}),
}


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def build(name: str) -> Net:
    torch.manual_seed(0)
    middle, layers = SPELLINGS[name]
    net = Net(middle, **copy.deepcopy(layers))  # the table is shared by all tests
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.double().eval()


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_bounded_soundly(name):
    net = build(name)
    torch.manual_seed(1)
    x, y = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 3, 1])
    threat = LinfBall(0.07)
    lower, upper = threat.box(x)
    corners = torch.where(torch.rand(300, *x.shape) > 0.5, lower, upper)
    with torch.no_grad():
        assert torch.allclose(trace(net, SHAPE).bind(x).logits, net(x), rtol=1e-12, atol=1e-12)
        logits = net(corners.flatten(0, 1)).unflatten(0, corners.shape[:2])
        margins = (logits.gather(2, y.expand(300, -1).unsqueeze(2)) - logits).amin(0)
        for method in METHODS:
            assert (margin_lower_bounds(net, x, y, threat, method) <= margins + 1e-9).all(), method


@pytest.mark.parametrize("name", ["nn.ReLU", "nn.AvgPool2d", "normalise", "nn.AdaptiveAvgPool2d", "batch norm"])
def test_a_vanishing_box_gives_the_margin_itself(name):
    """At eps 0 every method is exact, so nothing is lost or gained on the way."""
    net = build(name)
    x, y = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 3, 1])
    logits = net(x)
    exact = logits.gather(1, y.unsqueeze(1)) - logits
    for method in METHODS:
        assert torch.allclose(margin_lower_bounds(net, x, y, LinfBall(0.0), method), exact, atol=1e-10)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


UNSUPPORTED = {
    "sigmoid": (lambda s, x: torch.sigmoid(x), {}, "sigmoid"),
    "softmax module": (lambda s, x: s.a(x), {"a": nn.Softmax(1)}, "Softmax"),
    "product of values": (lambda s, x: x * torch.relu(x), {}, "mul"),
    "division by values": (lambda s, x: 1 / (x + 2), {}, "truediv"),
    "indexing": (lambda s, x: x[:, :1], {}, "getitem"),
    "transpose": (lambda s, x: x.permute(0, 2, 1, 3), {}, "permute"),
    "steep leaky": (lambda s, x: F.leaky_relu(x, 2.0), {}, "non-convex"),
    "reflect padding": (lambda s, x: s.c(x), {"c": nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect")}, "reflect"),
    "divisor": (lambda s, x: F.avg_pool2d(x, 2, divisor_override=3), {}, "divisor_override"),
    "channels selected": (lambda s, x: torch.index_select(x, 1, torch.tensor([0])), {}, "flat inputs"),
    "a feature twice": (lambda s, x: x.flatten(1).index_select(1, torch.tensor([3, 5, 3])), {}, "twice"),
    "shared feature linear": (lambda s, x: s.l(x), {"l": nn.Linear(6, 2)}, "flat inputs"),
    "batch into features": (lambda s, x: x.view(-1, 36).relu().view(-1, 72), {}, "batch as first dimension"),
    "batch size as number": (lambda s, x: x / x.size(0), {}, "batch size"),
    "broadcast up": (lambda s, x: F.adaptive_avg_pool2d(x, 1) + s.mean.expand(1, 2, 6, 6), {}, "broadcasting"),
    "overwritten skip": (lambda s, x: _overwrite(s, x), {"act": nn.ReLU(inplace=True)}, "in place"),
}


def _overwrite(s, x):
    y = s.conv(x)
    z = s.act(y)
    return z + y


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_is_an_error_that_names_it(name):
    middle, layers, word = UNSUPPORTED[name]
    net = Net(middle, **copy.deepcopy(layers)).eval()
    with pytest.raises(UnsupportedLayer, match=word) as error:
        margin_lower_bounds(net, torch.rand(2, *SHAPE), torch.tensor([0, 1]), LinfBall(0.1))
    assert "Supported are: Linear, Conv2d" in str(error.value)


def test_tracing_a_known_network_does_not_load_torchs_compiler():
    """fx's record of the code's lines does, which takes a second or more, and falls on the first input certified."""
    code = (
        "import sys, torch; from certifiers import trace; trace(torch.nn.Sequential(torch.nn.Linear(2, 2)), (2,)); "
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_error_shows_the_source_line():
    net = Net(UNSUPPORTED["sigmoid"][0]).eval()
    with pytest.raises(UnsupportedLayer, match=r"torch.sigmoid\(x\)"):
        trace(net, SHAPE)


def test_branches_on_data_are_refused():
    with pytest.raises(UnsupportedLayer, match="branches on the data"):
        trace(Branch().eval(), SHAPE)


def test_active_dropout_is_refused():
    net = build("nn.Dropout").train()
    with pytest.raises(UnsupportedLayer, match="dropout is switched on"):
        trace(net, SHAPE)


def test_inputs_of_the_wrong_shape():
    with pytest.raises(InputError, match="random ones failed"):
        trace(build("nn.ReLU"), (3, 6, 6))


def test_a_replaced_layer_is_noticed():
    net = build("nn.ReLU")
    x = torch.rand(2, *SHAPE, dtype=torch.float64)
    before = trace(net, SHAPE)
    assert trace(net, SHAPE) is before
    net.conv = nn.Conv2d(2, 3, 3, padding=1).double()
    assert torch.allclose(trace(net, SHAPE).bind(x).logits, net(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
def test_a_copy_of_a_traced_model_is_bounded_by_its_own_weights(duplicate):
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).eval()
    x, y = torch.rand(2, *SHAPE), torch.tensor([0, 1])
    before = margin_lower_bounds(net, x, y, LinfBall(0.1))
    twin = duplicate(net)
    twin._modules = dict(net._modules) | {"1": nn.Linear(72, 4)}
    logits = twin(x)
    exact = margin_lower_bounds(twin, x, y, LinfBall(0.0))
    assert torch.allclose(exact, logits.gather(1, y.unsqueeze(1)) - logits, atol=1e-5)
    assert torch.equal(margin_lower_bounds(net, x, y, LinfBall(0.1)), before)


def test_a_traced_model_can_be_saved_and_is_not_kept_alive():
    net = build("nn.ReLU")
    trace(net, SHAPE)
    assert set(net.state_dict()) == set(build("nn.ReLU").state_dict())
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


def test_the_dtype_may_change_after_tracing():
    net = build("nn.AvgPool2d")
    x, y = torch.rand(2, *SHAPE, dtype=torch.float64), torch.tensor([0, 1])
    exact = margin_lower_bounds(net, x, y, LinfBall(0.1))
    single = margin_lower_bounds(net.float(), x.float(), y, LinfBall(0.1))
    assert single.dtype == torch.float32 and torch.allclose(single.double(), exact, atol=1e-4)


class Moody(nn.Module):
    """Its forward depends on what an object holds, which no graph shows."""

    def __init__(self):
        super().__init__()
        self.head, self.mood = nn.Linear(72, 4), SimpleNamespace(sign=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * self.mood.sign


def test_a_replaced_block_is_noticed():
    net = build("nested")
    x = torch.rand(2, *SHAPE, dtype=torch.float64)
    trace(net, SHAPE)
    net.n = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.ReLU())).double().eval()
    assert torch.allclose(trace(net, SHAPE).bind(x).logits, net(x))


def test_batch_statistics_are_never_certified():
    """Without running statistics an adversary moves the other inputs' normalisation too."""
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72, track_running_stats=False), nn.Linear(72, 4)).eval()
    x, y = torch.rand(2, *SHAPE), torch.tensor([0, 1])
    with pytest.raises(InputError, match="treat each input by itself"):
        certify(net, x, y, LinfBall(0.01))


def test_certification_notices_a_forward_that_changed_after_tracing():
    net = Moody().eval()
    x, y = torch.rand(2, *SHAPE), torch.tensor([0, 1])
    certify(net, x, y, LinfBall(0.01), attack_steps=0)
    net.mood.sign = -1.0
    labels = net(x).argmax(1)
    with pytest.raises(UnsupportedLayer, match="computes other values"):
        certify(net, x, labels, LinfBall(0.01), attack_steps=0)
