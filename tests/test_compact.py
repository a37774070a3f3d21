"""Compaction: equal everywhere, smaller, bounds no looser; by hand, on random networks, under attack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import certprune
from certifiers.bounds import margin_lower_bounds, trace
from certifiers.lirpa import margin_lower_bounds_lirpa
from certifiers.threat import L2Ball, LinfBall
from certifiers.vnncomp import export_onnx, read_network
from certprune.compact import compact, cost_of
from certprune.compact.layers import Branched, Select
from certprune.compact.steps import crown_work, steps_of
from certprune.models import build_model

from .nets import NETS
from .random_nets import CLASSES, SHAPE, random_net

METHODS = ("ibp", "crown-ibp", "crown")


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


def conv(weight: Tensor, bias: list[float], **options) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), **options)
    layer.weight.data, layer.bias.data = weight, torch.tensor(bias)
    return layer


def points(shape: tuple[int, ...], count: int, dtype=torch.float64) -> Tensor:
    """Random inputs of the whole domain, half of them corners."""
    x = torch.rand(count, *shape, dtype=torch.float64)
    x[::2] = x[::2].round()
    return x.to(dtype)


def same(a: nn.Module, b: nn.Module, shape: tuple[int, ...], count: int = 500, tolerance: float = 1e-10) -> bool:
    dtype = next(a.parameters()).dtype
    with torch.no_grad():
        x = points(shape, count, dtype).split(500)
        expected, got = (torch.cat([net(part) for part in x]) for net in (a, b))
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1))


def pruned(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random network, many of whose units have no weights left (and some a positive bias), others large biases."""
    net, draw = random_net(seed, dtype), torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            dead = torch.rand(len(layer.weight), generator=draw) < 0.3
            layer.weight.data[dead] = 0
            layer.weight.data *= torch.rand(layer.weight.shape, generator=draw) < 0.5
            if layer.bias is not None and len(layer.bias) > CLASSES:
                layer.bias.data += 2 * torch.randn(layer.bias.shape, generator=draw, dtype=dtype)
    return net


# By hand -------------------------------------------------------------------------------------------------------


def test_units_without_weights_become_biases():
    # Units 1 and 2 are the constants relu(2) = 2 and relu(-1) = 0; unit 3 is read by nobody.
    first = linear([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]], [0.0, 2.0, -1.0, 0.0])
    net = nn.Sequential(first, nn.ReLU(), linear([[1.0, 3.0, 5.0, 0.0], [2.0, 0.5, 1.0, 0.0]], [0.0, 1.0])).eval()
    small = compact(net, (2,)).model
    assert [tuple(p.shape) for p in small.parameters()] == [(1, 2), (1,), (2, 1), (2,)]
    assert small[2].weight.flatten().tolist() == [1.0, 2.0] and small[2].bias.tolist() == [6.0, 2.0]
    assert small[0].weight.tolist() == [[1.0, -1.0]] and same(net, small, (2,), tolerance=1e-6)


def test_a_constant_channel_before_a_padded_convolution_keeps_its_border():
    # Channel 1 is relu(2) = 2 everywhere; the 3x3 kernel of ones sees 9 of it inside, 6 at an edge, 4 in a corner.
    one = torch.zeros(1, 1, 3, 3)
    one[..., 1, 1] = 1.0
    first = conv(torch.cat([one, 0 * one]), [0.0, 2.0], padding=1)
    second = conv(torch.cat([one, torch.ones(1, 1, 3, 3)], 1), [0.5], padding=1)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    small = compact(net, (1, 4, 4)).model
    # Then all is active, and the network is linear.
    expected = torch.full((4, 4), 12.5)
    expected[1:3, 1:3] = 18.5
    expected[::3, ::3] = 8.5
    assert same(net, small, (1, 4, 4), tolerance=1e-6)
    zero = torch.zeros(1, 1, 4, 4)
    assert torch.allclose(small(zero), net[4:](expected.reshape(1, 1, 4, 4)), atol=1e-5)
    assert cost_of(small, (1, 4, 4)).multiply_adds < cost_of(net, (1, 4, 4)).multiply_adds


def test_without_padding_a_constant_channel_is_a_bias():
    first = conv(torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1), [-0.5, 2.0])
    second = conv(torch.ones(1, 2, 2, 2), [0.0])
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)).eval()
    small = compact(net, (1, 4, 4)).model
    assert [type(m).__name__ for m in small] == ["Conv2d", "ReLU", "Conv2d", "Flatten", "Linear"]  # active: no ReLU
    assert small[0].out_channels == 1 and small[2].bias.item() == pytest.approx(8.0)
    assert same(net, small, (1, 4, 4), tolerance=1e-6)


def test_inactive_units_go_and_active_ones_are_folded():
    # On [0, 1]^2: x1 + x2 - 3 <= -1 is never active, x1 - x2 + 2 >= 1 always; so the network is linear.
    net = nn.Sequential(
        linear([[1.0, 1.0], [1.0, -1.0]], [-3.0, 2.0]), nn.ReLU(), linear([[7.0, 2.0], [1.0, -1.0]], [0.0, 1.0])
    ).eval()
    small = compact(net, (2,)).model
    (only,) = small
    assert only.weight.tolist() == [[2.0, -2.0], [-1.0, 1.0]] and only.bias.tolist() == [4.0, -1.0]
    # Slightly beyond the domain's corner they would not be: 1 + 1 - 1.9 > 0.
    net[0].bias.data[0] = -1.9
    assert len(list(compact(net, (2,)).model.parameters())) > 2


def test_units_of_one_sign_are_decided_without_room_to_spare():
    """-x1 - 2 x2 <= 0 and x1 >= 0 touch 0 in a corner, and no rounding is in that."""
    net = nn.Sequential(
        linear([[-1.0, -2.0], [1.0, 0.0]], [0.0, 0.0]), nn.ReLU(), linear([[7.0, 2.0], [1.0, -1.0]], [0.0, 1.0])
    ).eval()
    (only,) = compact(net, (2,)).model
    assert only.weight.tolist() == [[2.0, 0.0], [-1.0, 0.0]] and only.bias.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_large_terms_that_cancel_do_not_hide_a_unit(method):
    """z = x20 - 1e15 (x0 + ... + x19) is 1 where the first pixels are black: centre and radius add up to 0."""
    first, last = nn.Linear(21, 2), nn.Linear(2, 2)
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.zero_()
            layer.bias.zero_()
        first.weight[0], first.weight[0, 20], first.weight[1, 20] = -1e15, 1.0, 0.1
        last.weight[0, 0], last.weight[1, 1], last.bias[1] = 1.0, 0.1, 0.5
    net = nn.Sequential(first, nn.ReLU(), last).eval()
    x = torch.zeros(1, 21)
    x[0, 20] = 1.0
    assert net(x)[0].tolist() == pytest.approx([1.0, 0.51])
    assert compact(net, (21,), method).model(x)[0].tolist() == pytest.approx([1.0, 0.51])


def test_active_units_beside_open_ones_are_one_matrix():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2)).eval()
    net[0].bias.data[:9] = 10.0
    net[0].weight.data[9:] = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [-1.0, 1.0, 1.0, -1.0]])
    net[0].bias.data[9:] = 0.0
    small = compact(net, (4,)).model
    shapes = [tuple(m.weight.shape) for m in small.modules() if isinstance(m, nn.Linear)]
    assert isinstance(small, Branched) and sorted(shapes) == [(2, 3), (2, 4), (3, 4)]
    assert same(net, small, (4,), tolerance=1e-6)
    assert cost_of(small, (4,)).multiply_adds == 2 * 3 + 2 * 4 + 3 * 4


def test_crown_proves_units_that_intervals_leave_open():
    # relu(x) + relu(x) - 2 x <= 0 for x >= 0, which intervals cannot see: they have [-2, 2] - 0.5.
    layers = linear([[1.0], [1.0]], [0.0, 0.0]), nn.ReLU(), linear([[1.0, -1.0]], [-0.5]), nn.ReLU()
    net = nn.Sequential(*layers, linear([[1.0], [2.0]], [0.0, 0.0])).eval()
    net[0].bias.data = torch.tensor([-0.2, -0.1])
    by_crown, by_intervals = (cost_of(compact(net, (1,), m).model, (1,)).multiply_adds for m in ("crown", "ibp"))
    assert by_crown < by_intervals


def test_large_networks_are_bounded_by_intervals(monkeypatch):
    from certprune.compact import compaction

    asked = []
    real = compaction.domain_boxes
    monkeypatch.setattr(compaction, "domain_boxes", lambda steps, method: asked.append(method) or real(steps, method))
    net = NETS["mlp"]()  # 64 x 24 of the first layer, for 24 units; then 24 x 16 more, for 16
    assert crown_work(steps_of(net, (1, 8, 8))) == 24 * 64 * 24 + 16 * (64 * 24 + 24 * 16)
    compact(net, (1, 8, 8))
    assert "crown" in asked
    asked.clear()
    monkeypatch.setattr(compaction, "CROWN_WORK", 10)
    compact(net, (1, 8, 8))
    assert set(asked) == {"ibp"}


def test_batch_norm_goes_into_the_layer_before_it():
    for name in ("bn", "residual"):
        net = NETS[name](seed=2, dtype=torch.float64)
        small = compact(net, (1, 8, 8)).model
        assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in small.modules())
        assert same(net, small, (1, 8, 8))


def test_a_dead_branch_of_a_residual_block_vanishes():
    net = NETS["residual"](seed=2, dtype=torch.float64)
    net.conv1.weight.data.zero_()
    net.bn.bias.data.fill_(-1.0)
    net.bn.running_mean.zero_()
    net.conv1.bias.data.zero_()  # conv1 -> bn -> relu is 0, so the branch is conv2's bias
    small = compact(net, (1, 8, 8)).model
    assert isinstance(small, nn.Sequential) and same(net, small, (1, 8, 8))
    assert sum(isinstance(m, nn.Conv2d) for m in small) == 2


def test_features_that_are_not_read_are_left_out():
    net = nn.Sequential(nn.Flatten(), nn.Linear(100, 60), nn.ReLU(), nn.Linear(60, 3)).eval()
    net[1].weight.data[:, 10:] = 0
    small = compact(net, (1, 10, 10)).model
    assert isinstance(small[1], Select) and small[1].index.tolist() == list(range(10))
    assert small[2].in_features == 10 and same(net, small, (1, 10, 10), tolerance=1e-6)
    net[1].weight.data[:, :90] = 1.0  # not worth a selection
    assert not any(isinstance(m, Select) for m in compact(net, (1, 10, 10)).model.modules())


def test_a_channel_that_is_constant_only_where_it_is_read():
    # relu(sum of the 3x3 neighbours - 5) is 0 in the corners, where only 4 of them are; then + 1. The convolution
    # behind it reads nothing but the corners and the padding's zeros.
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            first = torch.ones(2, 1, 3, 3)
            first[0, 0, 0] = 0.0  # another channel, that stays
            self.first = conv(first, [-1.5, -5.0], padding=1)
            self.second = conv(torch.ones(1, 2, 1, 1), [0.0], stride=2, padding=2)
            self.head = nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.second(torch.relu(self.first(x)) + 1.0).flatten(1))

    net = Net().eval()
    assert same(net, compact(net, (1, 3, 3)).model, (1, 3, 3), tolerance=1e-6)


class Crossing(nn.Module):
    """A selection that is added to a linear layer, one of whose units only somebody else reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.head, self.other = nn.Linear(3, 2), nn.Linear(3, 2)
        self.register_buffer("index", torch.tensor([0, 1, 2]))
        self.second.weight.data[:, 2:] = 0
        self.head.weight.data[:, 2] = 0

    def forward(self, x):
        hidden = torch.relu(self.first(x) - 0.5)
        z = self.second(hidden)
        return self.head(torch.relu(hidden.index_select(1, self.index) + z)) + self.other(z)


def test_what_is_read_twice_is_neither_removed_nor_overwritten():
    torch.manual_seed(5)
    net = Crossing().eval()
    small = compact(net, (4,)).model
    assert same(net, small, (4,), tolerance=1e-6)

    class Skipping(nn.Sequential):
        def forward(self, x):
            z = self[0](x)
            return self[1](torch.relu(z)) + self[2](z)

    net = Skipping(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)).eval()
    net[0].bias.data.fill_(-0.1)
    assert same(net, compact(net, (4,)).model, (4,), tolerance=1e-6)


def test_logits_that_depend_on_nothing():
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()
    net[3].weight.data.zero_()
    small = compact(net, (1, 4, 4)).model
    assert torch.equal(small(torch.rand(5, 1, 4, 4)), net[3].bias.expand(5, 4))


# Random networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(16))
def test_random_networks_stay_the_same_and_get_smaller(seed):
    net = pruned(seed)
    found = compact(net, SHAPE)
    assert same(net, found.model, SHAPE)
    before, after = cost_of(net, SHAPE), cost_of(found.model, SHAPE)
    assert after.multiply_adds <= before.multiply_adds
    x, y = points(SHAPE, 4), torch.randint(CLASSES, (4,))
    for method in METHODS:
        was = margin_lower_bounds(net, x, y, LinfBall(0.05), method)
        now = margin_lower_bounds(found.model, x, y, LinfBall(0.05), method)
        assert ((now - was) / was.abs().clamp(min=1)).min() >= (-1e-10 if method == "ibp" else -1e-4), method


def test_most_random_networks_do_get_smaller():
    costs = [[cost_of(net, SHAPE).multiply_adds for net in (n, compact(n, SHAPE).model)] for n in map(pruned, range(6))]
    assert sum(after < 0.7 * before for before, after in costs) >= 4


@pytest.mark.parametrize("seed", [1, 7, 12])
def test_an_attack_finds_no_difference(seed):
    """Gradient ascent over the whole domain on the distance between the two networks' logits."""
    net = pruned(seed)
    small = compact(net, SHAPE).model
    x = points(SHAPE, 64)
    for step in range(60):
        x = x.detach().requires_grad_()
        gap = (net(x) - small(x)).abs().sum()
        (slope,) = torch.autograd.grad(gap + 0 * x.sum(), x)
        x = (x + (0.3 if step < 30 else 0.05) * slope.sign()).clamp(0, 1)
    assert (net(x) - small(x)).abs().max() <= 1e-10 * net(x).abs().max().clamp(min=1)


@pytest.fixture(scope="module")
def sparse_cnn() -> nn.Module:
    """cnn_small at 98 %, by magnitude, untrained, its biases drawn so that some units never fire."""
    torch.manual_seed(3)
    net = build_model("cnn_small", (1, 28, 28), 10, batch_norm=True)
    certprune.sparsify(net, sparsity=0.98, criterion="magnitude", budget="erk")
    net = certprune.materialize(net)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.bias.data.normal_(std=0.3)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.01, 1.0)
    return net.eval()


def test_a_pruned_cnn_on_ten_thousand_inputs(sparse_cnn):
    found = compact(sparse_cnn, (1, 28, 28))
    assert same(sparse_cnn, found.model, (1, 28, 28), 10_000, 1e-5)
    before, after = (cost_of(net, (1, 28, 28)) for net in (sparse_cnn, found.model))
    assert after.multiply_adds < before.multiply_adds / 2 and after.compressed_bytes < before.compressed_bytes
    assert found.classes == 10 and found.input_shape == (1, 28, 28)


def test_a_compacted_network_is_traced_bounded_elsewhere_and_exported(sparse_cnn, tmp_path):
    small = compact(sparse_cnn, (1, 28, 28)).model
    x, y = torch.rand(3, 1, 28, 28), torch.tensor([1, 2, 3])
    assert torch.allclose(trace(small, (1, 28, 28)).bind(x).logits, small(x), atol=1e-5)
    bounds = margin_lower_bounds, margin_lower_bounds_lirpa
    ours, theirs = (bound(small, x, y, LinfBall(0.02), "crown-ibp").detach() for bound in bounds)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    assert margin_lower_bounds(small, x, y, L2Ball(0.1), "crown").isfinite().all()
    export_onnx(small, x, tmp_path / "small.onnx")
    assert torch.allclose(read_network(tmp_path / "small.onnx").model(x.flatten(1)), small(x), atol=1e-4)


@pytest.mark.parametrize("name", ["select", "branches", "map"])
def test_every_own_layer_is_exported_and_read(name, tmp_path):
    torch.manual_seed(0)
    if name == "select":
        net, shape = nn.Sequential(nn.Flatten(), nn.Linear(16, 80), nn.ReLU(), nn.Linear(80, 2)), (1, 4, 4)
        net[1].weight.data[:, 5:] = 0
    elif name == "branches":
        net, shape = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2)), (4,)
        net[0].bias.data[:9] = 10.0
    else:
        net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())
        net, shape = nn.Sequential(*net, nn.Flatten(), nn.Linear(32, 2)), (1, 4, 4)
        net[0].weight.data[1], net[0].bias.data[1] = 0, 1.0
    small = compact(net.eval(), shape).model
    kinds = {type(m).__name__ for m in small.modules()}
    assert kinds & {"select": {"Select"}, "branches": {"Sum"}, "map": {"Shift"}}[name]
    x = torch.rand(3, *shape)
    export_onnx(small, x, tmp_path / "small.onnx")
    assert torch.allclose(read_network(tmp_path / "small.onnx").model(x.flatten(1)), net(x), atol=1e-4)
    again = compact(small, shape).model  # compacting once more changes nothing
    assert cost_of(again, shape) == cost_of(small, shape) and same(net, again, shape, tolerance=1e-5)
