"""Patterns, schedules, comparable scores and budgets that compare them, by hand; and their errors."""

import pytest
import torch
import yaml
from torch import nn

from certifiers.errors import InputError
from certprune.masks import apply_masks, mask_state, score_parameters, sparsify
from certprune.pruning import Pruning, kept_counts, pattern_of, weight_gradients
from certprune.pruning.criteria import CRITERIA, Gradients, layer_adaptive
from certprune.pruning.schedules import Gradual, Iterative, OneShot
from certprune.recipes import dump_recipe, load_recipe, parse_recipe

from .nets import images, tiny_conv, tiny_mlp, tiny_residual

SCORES = torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 0.0], [5.0, 5.0, 5.0, 5.0, 0.0, 1.0, 0.5, 6.0]])


def marks(mask):
    return ["".join(".x"[int(value)] for value in row) for row in mask]


def test_two_of_four_by_hand():
    pattern = pattern_of("2:4")
    assert pattern.cap(SCORES.shape) == 8
    assert marks(pattern.select(SCORES, 8)) == ["x.x.xx..", "xx...x.x"]  # ties: the first
    assert marks(pattern.select(SCORES, 4)) == ["....xx..", "x......x"]
    # More than the pattern allows, while a sparsity grows: all that it allows, then the best of the others.
    assert marks(pattern.select(SCORES, 10)) == ["x.x.xxx.", "xxx..x.x"]
    assert pattern.ranked(SCORES)[0].tolist() == [4, -torch.inf, 3, -torch.inf, 9, 8, -torch.inf, -torch.inf]


def test_channels_by_hand():
    pattern = pattern_of("channels")
    assert marks(pattern.select(SCORES, 8)) == ["xxxxxxxx", "........"]  # means 4.25 and 3.44
    assert pattern.ranked(SCORES).tolist() == [[4.25] * 8, [3.4375] * 8]
    conv = torch.stack([torch.full((2, 3, 3), value) for value in (1.0, 3.0, 2.0)])
    assert pattern.select(conv, 36).flatten(1).all(1).tolist() == [False, True, True]
    shape = torch.Size((5, 10))
    assert [pattern.whole(kept, shape) for kept in (1, 14, 15, 25, 49, 50)] == [10, 10, 20, 30, 50, 50]


def test_a_layer_pruned_two_of_four_fits_torchs_kernels():
    model = sparsify(tiny_mlp(), 0.5, "magnitude", "uniform", pattern="2:4")
    for name, mask in mask_state(model).items():
        assert (mask.view(mask.shape[0], -1, 4).sum(2) == 2).all(), name


def test_pattern_errors():
    with pytest.raises(InputError, match="rows of a multiple of 5 weights, but those of '1' have 64"):
        sparsify(tiny_mlp(), 0.9, pattern="2:5")
    with pytest.raises(InputError, match="pattern allows no more than .*Raise the sparsity to 0.5 or more"):
        sparsify(tiny_mlp(), 0.4, budget="erk", pattern="2:4")
    with pytest.raises(InputError, match="pattern allows no more"):
        sparsify(tiny_mlp(), 0.4, "magnitude", "global", pattern="2:4")
    for name in ("4:2", "2:2", "0:4"):
        with pytest.raises(InputError, match="1 <= N < M"):
            pattern_of(name)
    with pytest.raises(InputError, match="Did you mean 'channels'.*or N:M"):
        pattern_of("channel")
    with pytest.raises(InputError, match="cannot prune '5': its output channels are the network's classes.*exclude"):
        sparsify(tiny_mlp(), 0.5, pattern="channels")


def test_channels_of_a_residual_sum_are_refused():
    model = tiny_residual()
    for name in ("conv2", "skip"):
        with pytest.raises(InputError, match=f"cannot prune '{name}': its output channels are summed with others"):
            sparsify(model, 0.5, layers=["stem", name], pattern="channels")
    sparsify(model, 0.5, "magnitude", layers=["stem", "conv1"], pattern="channels")
    rows = mask_state(model)["conv1.weight"].flatten(1)
    assert rows.all(1).sum() == 3 and rows.any(1).sum() == 3


class Shifted(nn.Module):
    """A sum with a constant keeps channels apart; one behind another layer is that layer's affair."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)) + self.shift + 1.0)
        return self.head(self.second(x) + x.mean(1, keepdim=True))


def test_a_constant_is_no_residual_sum():
    with pytest.raises(InputError, match="'second'"):
        sparsify(Shifted(), 0.5, layers=["second"], pattern="channels")
    with pytest.raises(InputError, match="'first'"):  # through the mean, which sums channels
        sparsify(Shifted(), 0.5, layers=["first"], pattern="channels")
    model = nn.Sequential(Shifted().first, nn.ReLU(), nn.Linear(4, 2))
    sparsify(model, 0.5, layers=["0"], pattern="channels")


def test_cubic_growth_by_hand():
    gradual = Gradual(every=1, start=0.0, end=0.5, power=3)
    grown = [gradual.sparsity(0.8, step, 8) for step in range(8)]
    expected = [0.8 * (1 - (1 - t) ** 3) for t in (0.25, 0.5, 0.75)]
    assert grown[:3] == pytest.approx(expected) and grown[3:] == [0.8] * 5
    assert [gradual.settled(step, 8) for step in range(8)] == [False] * 3 + [True] * 5
    late = Gradual(every=1, start=0.5, end=0.95)
    assert [late.sparsity(0.8, step, 20) for step in (0, 9)] == [0, 0] and late.sparsity(0.8, 10, 20) > 0
    for steps in (1, 2, 7, 100, 1234):
        assert late.settled(steps - 1, steps) and late.sparsity(0.8, steps - 1, steps) == 0.8


def test_masks_move_every_so_often():
    gradual = Gradual(every=10)
    assert [step for step in range(400) if gradual.moves(step, 400)] == list(range(0, 400, 10))
    assert [step for step in range(9) if gradual.moves(step, 40)] == [0, 2, 4, 6, 8]
    assert OneShot().settled(0, 5) and OneShot().sparsity(0.7, 0, 5) == 0.7 and not OneShot().rewinds(10, 100)


@pytest.mark.parametrize(("steps", "rounds"), [(9, 3), (10, 3), (7, 4), (5, 5)])
def test_iterative_rounds(steps, rounds):
    iterative = Iterative(rounds=rounds)
    starts = [step for step in range(steps) if iterative.moves(step, steps)]
    assert len(starts) == rounds and starts[0] == 0
    assert [iterative.rewinds(step, steps) for step in starts] == [False] + [True] * (rounds - 1)
    left = [1 - iterative.sparsity(0.99, step, steps) for step in starts]
    assert left == pytest.approx([0.01 ** ((i + 1) / rounds) for i in range(rounds)]) and left[-1] == 1 - 0.99
    assert [iterative.settled(step, steps) for step in starts] == [False] * (rounds - 1) + [True]
    assert all(iterative.progress(step, steps) < 1 / (steps / rounds) for step in starts)


def test_layer_adaptive_scores_by_hand():
    # Squares 9, 4, 1, 0 from the largest: 9/9, 4/13, 1/14, 0/14; a layer's scale does not matter.
    scores = torch.tensor([[1.0, 3.0], [-2.0, 2.0]])
    expected = torch.tensor([[1 / 14, 1.0], [0.0, 4 / 13]])
    torch.testing.assert_close(layer_adaptive(scores), expected)
    torch.testing.assert_close(layer_adaptive(7 * scores), expected)
    assert layer_adaptive(torch.zeros(3)).tolist() == [0, 0, 0]


def test_one_threshold_over_all_layers_by_hand():
    shapes, scores = [(1, 4), (1, 4)], [torch.tensor([[9.0, 8, 7, 1]]), torch.tensor([[6.0, 2, 2, 2]])]
    assert kept_counts("global", shapes, 0.5, scores=scores) == [3, 1]
    assert kept_counts("global", shapes, 0.25, scores=scores) == [3, 3]  # of three equal ones two
    assert kept_counts("global", shapes, 0.5, floor=2, scores=scores) == [2, 2]
    assert kept_counts("global", shapes, 0.5, floor=0.3, scores=scores) == [2, 2]  # 1.2 weights, rounded up
    assert kept_counts("global", shapes, 0.75, scores=scores) == [1, 1]  # never none
    with pytest.raises(InputError, match="compares the scores"):
        kept_counts("global", shapes, 0.5)


def test_floors_by_hand():
    # Uniform: 10 % of 10 and of 90 weights are 1 and 9; three of the first leave seven to the second.
    assert kept_counts("uniform", [(1, 10), (9, 10)], 0.9, floor=3) == [3, 7]
    assert kept_counts("uniform", [(1, 10), (9, 10)], 0.9, floor=0.05) == [1, 9]
    assert kept_counts("erk", [(2, 2), (10, 100)], 0.99, floor=4) == [4, 6]
    assert kept_counts("uniform", [(1, 2), (10, 10)], 0.9, floor=5) == [2, 8]  # a layer has no more than it has
    with pytest.raises(InputError, match="keep at least 12 together by their floors"):
        kept_counts("erk", [(1, 10), (9, 10)], 0.9, floor=6)
    for floor in (0, -1, 1.5, float("nan"), True, "2"):
        with pytest.raises(InputError, match="floor is the least"):
            kept_counts("erk", [(1, 10), (9, 10)], 0.9, floor=floor)


def test_a_learned_budget_moves_with_its_offsets():
    model = sparsify(tiny_mlp(), 0.9, "joint", "learned")
    pruning = Pruning(0.9, "joint", "learned")
    parameters = score_parameters(model)
    scores, offsets = parameters[::2], parameters[1::2]
    assert [tuple(offset.shape) for offset in offsets] == [(), (), ()]
    x, y = images(4)
    nn.functional.cross_entropy(model(x), y).backward()
    for score, offset, mask in zip(scores, offsets, mask_state(model).values(), strict=True):
        torch.testing.assert_close(offset.grad, score.grad.sum() / mask.sum())
    kept = [int(mask.sum()) for mask in mask_state(model).values()]
    before = pruning.counts(scores, offsets=offsets)
    assert before == kept
    offsets[2].data += 1.0
    after = pruning.counts(scores, offsets=offsets)
    assert after[2] == 160 > before[2] and sum(after) == sum(before)


def test_snip_and_taylor_by_hand():
    """y = w x with the loss mean(y): the gradient by w is x's mean, in each of two batches another."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[2.0, -3.0]])
    batches = [torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -1.0]])]
    found = weight_gradients(model, ["0"], [lambda net, x=x: net(x).mean() for x in batches])["0"]
    assert found.mean.tolist() == [[2.0, 0.0]] and found.square.tolist() == [[5.0, 1.0]]
    assert CRITERIA["snip"].scores(model[0].weight, None, found).tolist() == [[4.0, 0.0]]
    assert CRITERIA["taylor"].scores(model[0].weight, None, found).tolist() == [[20.0, 9.0]]
    assert model[0].weight.grad is None
    with pytest.raises(InputError, match="weights of '0' is not finite"):
        weight_gradients(model, ["0"], [lambda net: net(batches[0]).mean() * float("inf")])
    with pytest.raises(InputError, match="'snip' ranks weights by the loss's gradients"):
        sparsify(tiny_conv(), 0.5, "snip")


def test_snips_scores_are_the_pull_on_the_mask():
    """|dL/dmask| with the mask at one, as the paper defines it."""
    model = tiny_conv(dtype=torch.float64)
    x, y = images(4, dtype=torch.float64)
    loss = lambda net: nn.functional.cross_entropy(net(x), y)  # noqa: E731
    scores = CRITERIA["snip"].scores(model[2].weight.detach(), None, weight_gradients(model, ["2"], [loss])["2"])
    masked = apply_masks(tiny_conv(dtype=torch.float64), {"2.weight": torch.ones_like(scores, dtype=torch.bool)})
    at = (3, 1, 2, 2)
    values = []
    for change in (1e-6, -1e-6):
        weight = masked[2].parametrizations.weight.original
        with torch.no_grad():
            weight[at] = model[2].weight[at] * (1 + change)
            values.append(loss(masked))
    assert abs(values[0] - values[1]).item() / 2e-6 == pytest.approx(scores[at].item(), rel=1e-5)


def test_gradients_need_not_reach_every_layer():
    assert CRITERIA["snip"].in_loss_units
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    found = weight_gradients(model, ["used", "idle"], [lambda net: net["used"](torch.ones(1, 2)).sum()])
    assert isinstance(found["idle"], Gradients) and not found["idle"].square.any() and found["used"].mean.all()


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ({"budget": "learned", "criterion": "magnitude"}, "trained along with scores.*score"),
        ({"schedule": "iterative", "criterion": "score"}, "rewinds weights.*joint"),
        ({"schedule": "gradul"}, "Did you mean 'gradual'"),
        ({"pattern": "5:4"}, "1 <= N < M"),
        ({"floor": 0}, "floor"),
        ({"floor": 1.5}, "floor"),
        ({"dense": True, "pattern": "2:4", "floor": 2}, "leave out floor, pattern"),
    ],
)
def test_recipes_refuse_what_means_nothing(variant, says):
    base = {"name": "r", "data": {"name": "digits"}, "model": {"name": "mlp"}, "objective": {"name": "benign"}}
    with pytest.raises(InputError, match=says):
        parse_recipe({**base, "variants": [variant]})


def test_every_round_needs_an_epoch():
    base = {"name": "r", "data": {"name": "digits"}, "model": {"name": "mlp"}, "objective": {"name": "benign"}}
    ways = {"variants": [{"criterion": "magnitude", "schedule": "iterative"}]}
    with pytest.raises(InputError, match="prune.rounds is 3 and prune.epochs 2"):
        parse_recipe({**base, **ways, "prune": {"epochs": 2}})
    parse_recipe({**base, **ways, "prune": {"epochs": 2, "rounds": 2}})
    parse_recipe({**base, **ways, "prune": {"epochs": 0}})


def test_names_tell_variants_apart():
    base = {"name": "r", "data": {"name": "digits"}, "model": {"name": "mlp"}, "objective": {"name": "benign"}}
    ways = [{"schedule": "gradual", "criterion": "joint", "budget": "global"}, {"pattern": "2:4", "floor": 0.01}, {}]
    recipe = parse_recipe({**base, "variants": [{"sparsity": 0.9, **way} for way in ways]})
    names = [variant.name for variant in recipe.variants]
    assert names == ["joint-global-0.9-gradual", "score-erk-0.9-2of4-floor0.01", "score-erk-0.9"]


def test_two_of_four_needs_no_quotes_in_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: r\ndata: {name: digits}\nmodel: {name: mlp}\nobjective: {name: benign}\nseed: 12\n"
        "variants:\n  - {sparsity: 0.5, pattern: 2:4, floor: 7}\n  - {pattern: 1:10, floor: 1/50}\n"
    )
    recipe = load_recipe(path)
    assert [variant.pattern for variant in recipe.variants] == ["2:4", "1:10"]
    assert [variant.floor for variant in recipe.variants] == [7, 0.02] and recipe.seed == 12
    assert load_recipe(path, ["variants.0.pattern=4:8"]).variants[0].pattern == "4:8"
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe == parse_recipe(yaml.safe_load(again.read_text()))
