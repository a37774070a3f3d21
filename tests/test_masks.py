"""Masks: exact kept counts, straight-through gradients, masked = materialised to the bit, and every error."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from certifiers.bounds import margin_lower_bounds
from certifiers.errors import InputError
from certifiers.threat import LinfBall
from certprune.masks import (
    FixedMask,
    ScoreMask,
    apply_masks,
    freeze_masks,
    mask_state,
    materialize,
    score_parameters,
    sparsify,
    sparsity,
    weight_parameters,
)
from certprune.models import build_model
from certprune.pruning import kept_counts
from certprune.pruning.top import top_mask
from tests.nets import NETS, images, tiny_conv, tiny_mlp


class Grouped(nn.Module):
    """Grouped, depthwise and dilated convolutions, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.grouped(self.grouped(x).relu()).relu()
        return self.head(self.depthwise(x).relu().flatten(1))


def grouped(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Grouped().eval()


ALL = {**NETS, "grouped": grouped}


def test_top_mask_by_hand():
    scores = torch.tensor([[0.1, 3.0, -2.0], [0.5, 0.1, 0.7]])
    assert top_mask(scores, 3).tolist() == [[False, True, False], [True, False, True]]
    # 0.1 stands twice: the lower index wins.
    assert top_mask(scores, 4).tolist() == [[True, True, False], [True, False, True]]


@pytest.mark.parametrize("kept", [1, 2, 7, 11, 12])
def test_equal_scores_keep_the_first(kept):
    assert top_mask(torch.full((3, 4), 0.5), kept).flatten().tolist() == [True] * kept + [False] * (12 - kept)


@pytest.mark.parametrize("seed", range(20))
def test_top_mask_is_a_stable_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (200,), generator=generator).float()  # many ties
    kept = int(torch.randint(1, 201, (), generator=generator))
    expected = torch.zeros(200, dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:kept]] = True
    assert torch.equal(top_mask(scores, kept), expected)


@pytest.mark.parametrize("criterion", ["score", "magnitude", "random"])  # all: test_pruning_matrix.py
@pytest.mark.parametrize("budget", ["uniform", "erk"])
@pytest.mark.parametrize("constant", [False, True])
def test_kept_counts_are_exact(criterion, budget, constant):
    model = tiny_conv()
    if constant:
        for layer in model:
            if hasattr(layer, "weight"):
                nn.init.constant_(layer.weight, 0.25)
    shapes = [layer.weight.shape for layer in model if hasattr(layer, "weight")]
    sparsify(model, 0.9, criterion, budget)
    masks = mask_state(model)
    assert [int(mask.sum()) for mask in masks.values()] == kept_counts(budget, shapes, 0.9)
    report = sparsity(model)
    assert [row.kept for row in report.layers] == kept_counts(budget, shapes, 0.9)
    assert report.kept == sum(row.kept for row in report.layers)
    assert report.weights == sum(shape.numel() for shape in shapes)
    assert report.total == pytest.approx(1 - report.kept / report.weights)
    if constant:
        # The effective weight is not zero exactly where the mask is true.
        assert sparsity(materialize(model)) == report


def test_magnitude_keeps_the_largest_and_leaves_them_alone():
    model = tiny_mlp()
    weight = model[1].weight.detach().clone()
    sparsify(model, 0.75, "magnitude")
    effective = model[1].weight.detach()
    kept = effective != 0
    assert torch.equal(effective[kept], weight[kept])
    assert weight[~kept].abs().max() <= weight[kept].abs().min()
    assert isinstance(model[1], nn.Linear) and model[1].bias.abs().min() > 0


def test_scores_start_with_the_magnitude_mask():
    scored, least = tiny_conv(), tiny_conv()
    sparsify(scored, 0.9, "score")
    sparsify(least, 0.9, "magnitude")
    for name, mask in mask_state(least).items():
        assert torch.equal(mask_state(scored)[name], mask)


def test_random_masks_follow_the_seed():
    def masks(seed):
        return mask_state(sparsify(tiny_conv(), 0.5, "random", seed=seed))["0.weight"]

    assert torch.equal(masks(1), masks(1)) and not torch.equal(masks(1), masks(2))


def test_the_mask_follows_the_scores():
    model = sparsify(tiny_mlp(), 0.9, "score")
    scores = score_parameters(model)[0]
    before = mask_state(model)["1.weight"]
    with torch.no_grad():
        scores.neg_()
    after = mask_state(model)["1.weight"]
    assert not (before & after).any() and before.sum() == after.sum()
    assert torch.equal(model[1].weight != 0, after)


@pytest.mark.parametrize("name", sorted(ALL))
def test_score_gradient_is_straight_through_exactly(name):
    """d/dscores = (effective weight's gradient) * weight; d/dweight = (the same) * mask."""
    x, y = images(4, seed=1)
    model = sparsify(ALL[name](), 0.7, "score")
    # Scores of other sizes and signs must not disturb the forward pass by a bit.
    with torch.no_grad():
        for scores in score_parameters(model):
            scores.mul_(1e6).sub_(3.3e5)
    plain = materialize(model)
    assert torch.equal(model(x), plain(x))
    with parametrize.cached():  # one effective weight, also for the layer that is used twice
        nn.functional.cross_entropy(model(x), y).backward()
    nn.functional.cross_entropy(plain(x), y).backward()
    masks, checked = mask_state(model), 0
    for layer_name, layer in model.named_modules():
        if not parametrize.is_parametrized(layer):
            continue
        gradient = plain.get_submodule(layer_name).weight.grad
        original = layer.parametrizations.weight.original
        assert torch.equal(layer.parametrizations.weight[0].scores.grad, gradient * original.detach())
        assert torch.equal(original.grad, gradient * masks[f"{layer_name}.weight"])
        checked += bool(gradient.abs().max() > 0)
    assert checked == len(masks)


@pytest.mark.parametrize("name", sorted(NETS))
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_bounds_see_the_mask_and_reach_the_scores(name, method):
    """Bounds of the masked model are the materialised one's to the bit, and so are the gradients."""
    x, y = images(4)
    model = sparsify(NETS[name](), 0.7, "score")
    plain = materialize(model)
    bounds = [margin_lower_bounds(net, x, y, LinfBall(0.05), method=method) for net in (model, plain)]
    assert torch.equal(*bounds)
    for bound in bounds:
        bound.sum().backward()
    for weight_name, mask in mask_state(model).items():
        layer = model.get_submodule(weight_name.removesuffix(".weight"))
        gradient = plain.get_parameter(weight_name).grad
        original = layer.parametrizations.weight.original
        assert gradient[~mask].abs().max() > 0  # of removed weights too
        assert torch.equal(layer.parametrizations.weight[0].scores.grad, gradient * original.detach())
        assert torch.equal(original.grad, gradient * mask)


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("criterion", ["score", "magnitude"])
@pytest.mark.parametrize("training", [False, True])
def test_masked_equals_materialised_to_the_bit(name, criterion, training):
    x, _ = images(5, seed=2)
    dense = ALL[name]()
    dense_keys, dense_types = list(dense.state_dict()), [type(m) for m in dense.modules()]
    model = sparsify(copy.deepcopy(dense), 0.8, criterion).train(training)
    for parameter in weight_parameters(model):
        parameter.requires_grad_(False)
    plain = materialize(model)
    twin = copy.deepcopy(model)  # BatchNorm's statistics move in training
    assert torch.equal(twin(x), plain(x))
    assert list(plain.state_dict()) == dense_keys
    assert [type(m) for m in plain.modules()] == dense_types
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    # The model that was copied still works, with its masks.
    assert len(mask_state(model)) == len(mask_state(twin)) > 0
    assert torch.equal(model.eval()(x), materialize(model)(x))


def test_materialised_model_shares_no_memory():
    model = sparsify(tiny_mlp(), 0.5)
    plain = materialize(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.fill_(7.0)
    assert not any((p == 7.0).any() for p in model.parameters())


def test_shared_layers_stay_shared():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), layer, nn.ReLU(), layer)
    sparsify(model, 0.5)
    plain = materialize(model)
    assert plain[2] is plain[4] and type(plain[2]) is nn.Linear
    x, _ = images(3)
    assert torch.equal(model(x), plain(x))
    assert len(mask_state(model)) == 2


def test_materialise_of_a_plain_model_is_a_copy():
    model = tiny_conv()
    plain = materialize(model)
    x, _ = images(3)
    assert plain is not model and torch.equal(plain(x), model(x))


def test_materialised_weights_load_into_a_new_model():
    model = sparsify(build_model("cnn_small", (1, 8, 8), 10, batch_norm=True), 0.9).eval()
    fresh = build_model("cnn_small", (1, 8, 8), 10, batch_norm=True).eval()
    fresh.load_state_dict(materialize(model).state_dict())
    x, _ = images(3)
    assert torch.equal(fresh(x), model(x))


def test_frozen_masks_stay_and_drop_the_scores():
    x, y = images(4)
    model = sparsify(tiny_conv(), 0.8, "score")
    with torch.no_grad():
        for scores in score_parameters(model):
            scores.copy_(torch.rand(scores.shape, generator=torch.Generator().manual_seed(4)))
    before, masks = model(x).detach(), mask_state(model)
    freeze_masks(model)
    assert torch.equal(model(x), before) and score_parameters(model) == []
    optimizer = torch.optim.SGD(weight_parameters(model), lr=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    for name, mask in mask_state(model).items():
        assert torch.equal(mask, masks[name])
        assert not model.get_submodule(name.removesuffix(".weight")).weight[~mask].any()


def test_parameters_are_parted_into_scores_and_the_rest():
    model = NETS["bn"]()
    dense = {name for name, _ in model.named_parameters()}
    sparsify(model, 0.5, exclude="0")
    assert [tuple(p.shape) for p in score_parameters(model)] == [(16, 64), (10, 16)]
    assert len(weight_parameters(model)) == len(dense)
    ids = {id(p) for p in score_parameters(model)} | {id(p) for p in weight_parameters(model)}
    assert ids == {id(p) for p in model.parameters()}


def test_mask_state_round_trip():
    x, _ = images(4)
    model = sparsify(ALL["grouped"](), 0.8, "random", seed=3)
    masks = mask_state(model)
    other = apply_masks(ALL["grouped"](), masks)
    assert torch.equal(other(x), model(x))
    assert mask_state(other).keys() == masks.keys()
    # As uint8, onto a model that has other masks; the present ones are replaced, scores and all.
    scored = sparsify(ALL["grouped"](), 0.5, "score")
    apply_masks(scored, {name: mask.to(torch.uint8) for name, mask in masks.items()})
    assert torch.equal(scored(x), model(x)) and score_parameters(scored) == []
    assert all(mask.dtype == torch.bool for mask in mask_state(scored).values())


def test_state_dict_restores_scores_and_masks():
    """What a resumed run relies on: the same `sparsify`, then `load_state_dict`."""
    for criterion, kind in (("score", ScoreMask), ("random", FixedMask)):
        model = sparsify(tiny_conv(seed=1), 0.8, criterion, seed=5)
        with torch.no_grad():
            for scores in score_parameters(model):
                scores.add_(torch.rand(scores.shape, generator=torch.Generator().manual_seed(2)))
        other = sparsify(tiny_conv(seed=2), 0.8, criterion, seed=6)
        other.load_state_dict(model.state_dict())
        x, _ = images(3)
        assert torch.equal(other(x), model(x))
        assert isinstance(other[0].parametrizations.weight[0], kind)


def test_report_counts_excluded_layers_as_dense():
    model = sparsify(tiny_conv(), 0.9, exclude=["7"])
    report = sparsity(model)
    assert report.layers[-1].kept == report.layers[-1].weights == 200
    assert report.total < 0.9 and "7.weight" not in mask_state(model)
    assert set(report.as_dict()) == {"total", "kept", "weights", "layers"}
    assert report.as_dict()["layers"][0] == {"name": "0", "weights": 36, "kept": 4}


def test_double_precision_models_keep_their_type():
    model = sparsify(tiny_conv(dtype=torch.float64), 0.9)
    assert model[0].weight.dtype == torch.float64
    assert materialize(model)[0].weight.dtype == torch.float64


def test_masks_compile_without_a_break():
    x, _ = images(3)
    model = sparsify(tiny_conv(), 0.8, "score")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    model(x).sum().backward()
    for ours, other in zip(score_parameters(model), score_parameters(compiled), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


def test_cached_reads_compute_the_mask_once():
    model = sparsify(tiny_mlp(), 0.5)
    with parametrize.cached():
        assert model[1].weight is model[1].weight
    assert model[1].weight is not model[1].weight


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 1.2}, "fraction of weights removed"),
        ({"sparsity": 1.0}, "fraction of weights removed"),
        ({"sparsity": -0.5}, "fraction of weights removed"),
        ({"sparsity": float("nan")}, "fraction of weights removed"),
        ({"criterion": "scores"}, "Unknown criterion 'scores'. Did you mean 'score'"),
        ({"budget": "urk"}, "Unknown budget 'urk'. Did you mean 'erk'"),
        ({"layers": ["fc*"]}, "matches no layer"),
        ({"exclude": ["head"]}, "matches no layer"),
        ({"exclude": "*"}, "leaves no layer"),
        ({"sparsity": 0.999, "budget": "erk"}, "at least one each"),
    ],
)
def test_errors_leave_the_model_as_it_was(options, says):
    model = tiny_conv()
    keys = list(model.state_dict())
    with pytest.raises(InputError, match=says):
        sparsify(model, **{"sparsity": 0.5, **options})
    assert list(model.state_dict()) == keys and mask_state(model) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(value):
    model = tiny_conv()
    with torch.no_grad():
        model[7].weight[0, 0] = value
    with pytest.raises(InputError, match="weights of '7' must be finite"):
        sparsify(model, 0.5)
    assert mask_state(model) == {}  # nor the layers before it


def test_a_model_is_sparsified_once():
    model = sparsify(tiny_conv(), 0.5)
    with pytest.raises(InputError, match="masked already"):
        sparsify(model, 0.9)


def test_weights_under_other_means_are_refused():
    pruned = tiny_mlp()
    prune.random_unstructured(pruned[1], "weight", 0.5)
    with pytest.raises(InputError, match="'1' is not a plain parameter"):
        sparsify(pruned, 0.5)
    normed = tiny_mlp()
    nn.utils.parametrizations.weight_norm(normed[3])
    with pytest.raises(InputError, match="'3' is not a plain parameter"):
        sparsify(normed, 0.5)
    later = sparsify(tiny_mlp(), 0.5)
    parametrize.register_parametrization(later[1], "bias", nn.Identity())
    with pytest.raises(InputError, match="other parametrisations"):
        materialize(later)


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    with pytest.raises(InputError, match="shared: 0.weight, 2.weight"):
        sparsify(model, 0.5)


@pytest.mark.parametrize(
    ("name", "mask", "says"),
    [
        ("9.weight", torch.ones(4, 1, 3, 3), "no such weight"),
        ("0.bias", torch.ones(4), "no such weight"),
        ("0.weight", torch.ones(4, 1, 3, 2), "has shape"),
        ("0.weight", torch.full((4, 1, 3, 3), 2, dtype=torch.uint8), "only 0 and 1"),
        ("0.weight", torch.full((4, 1, 3, 3), float("nan")), "only 0 and 1"),
    ],
)
def test_foreign_masks_are_refused(name, mask, says):
    model = tiny_conv()
    with pytest.raises(InputError, match=says):
        apply_masks(model, {"2.weight": torch.ones(6, 4, 4, 4), name: mask})
    assert mask_state(model) == {}
