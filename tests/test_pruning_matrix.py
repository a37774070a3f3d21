"""Every criterion by every budget, schedule and pattern: the asked count, in the asked places, through real stages;
and a stage that is cut off and resumed ends with the same bits."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from certifiers.errors import InputError
from certprune.data import load_data
from certprune.data.splits import Split
from certprune.masker import Masker
from certprune.masks import mask_state, materialize, sparsify, sparsity
from certprune.optimizers import Group
from certprune.progress import Progress
from certprune.pruning import BUDGETS, CRITERIA, SCHEDULES, Pruning, kept_counts, weight_gradients
from certprune.recipes import parse_recipe
from certprune.runs import start_run
from certprune.stage_settings import SGD, Constant, StageSettings
from certprune.stages import run_stages, stage_epochs
from certprune.training import Plan, train

from .nets import images, tiny_conv

LAYERS = ("2", "5")  # of tiny_conv: rows of 64 and 96 weights; 6 and 20 channels
PATTERNS = ("unstructured", "2:4", "1:8", "channels")
MATRIX = [
    (criterion, budget, schedule, pattern)
    for criterion, budget, schedule, pattern in itertools.product(CRITERIA, BUDGETS, SCHEDULES, PATTERNS)
    if not (budget == "learned" and not CRITERIA[criterion].trained)
    if not (schedule == "iterative" and criterion == "score")
]
X, Y = images(8)


def loss(model):
    return nn.functional.cross_entropy(model(X), Y)


def trained(criterion, budget, schedule, pattern, steps=12, final=0.9):
    """A net whose masks have been through a stage in which weights and scores move at random, and its masker."""
    net = tiny_conv()
    gradients = weight_gradients(net, LAYERS, [loss])
    sparsify(net, final, criterion, budget, LAYERS, pattern=pattern, gradients=gradients)
    pruning = Pruning(final, criterion, budget, pattern=pattern)
    masker = Masker(net, pruning, SCHEDULES[schedule](every=1), LAYERS)
    generator = torch.Generator().manual_seed(1)
    kept = []
    for step in range(steps):
        masker.begin_step(step, steps, loss)
        kept.append(sum(int(mask.sum()) for mask in mask_state(net).values()))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    assert masker.settled(steps - 1, steps)
    return net, kept


def fits(pattern, mask):
    if pattern == "channels":
        rows = mask.flatten(1)
        return torch.equal(rows.all(1), rows.any(1))
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        return bool((mask.flatten().view(-1, m).sum(1) <= n).all())
    return True


@pytest.mark.parametrize(("criterion", "budget", "schedule", "pattern"), MATRIX)
def test_every_combination_keeps_what_was_asked(criterion, budget, schedule, pattern):
    net, kept = trained(criterion, budget, schedule, pattern)
    masks = mask_state(net)
    shapes = {name: mask.shape for name, mask in masks.items()}
    assert set(shapes) == {"2.weight", "5.weight"}
    asked = round(0.1 * sum(shape.numel() for shape in shapes.values()))
    halves = sum(shape[1:].numel() for shape in shapes.values()) / 2 if pattern == "channels" else 0
    assert abs(kept[-1] - asked) <= halves
    assert all(mask.any() and fits(pattern, mask) for mask in masks.values())
    if not BUDGETS[budget].by_scores and pattern != "channels":
        counts = kept_counts(budget, list(shapes.values()), 0.9)
        assert [int(mask.sum()) for mask in masks.values()] == counts
    if schedule == "one_shot":
        assert len(set(kept)) == 1 or BUDGETS[budget].by_scores
    else:
        assert kept[0] > 2 * kept[-1]
        assert all(later <= earlier + 2 * halves for earlier, later in itertools.pairwise(kept))
    plain = materialize(net)
    assert sparsity(plain).kept == sparsity(net).kept and torch.equal(plain(X), net(X))


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("budget", sorted(BUDGETS))
def test_a_floor_holds_for_every_budget(criterion, budget):
    if budget == "learned" and not CRITERIA[criterion].trained:
        pytest.skip("learned budgets need trained scores")
    net = tiny_conv()
    total = sum(layer.weight.numel() for layer in net if hasattr(layer, "weight"))
    gradients = weight_gradients(net, ["0", "2", "5", "7"], [loss])
    sparsify(net, 0.99, criterion, budget, floor=5, gradients=gradients)
    counts = [row.kept for row in sparsity(net).layers]
    assert min(counts) >= 5 and sum(counts) == round(0.01 * total)
    net = tiny_conv()
    sparsify(net, 0.99, criterion, budget, floor=0.005, gradients=gradients)
    rows = sparsity(net).layers
    assert all(row.kept >= math.ceil(0.005 * row.weights) for row in rows)
    assert abs(sum(row.kept for row in rows) - round(0.01 * total)) <= len(rows) * (budget == "uniform")
    with pytest.raises(InputError, match="floor"):
        sparsify(tiny_conv(), 0.99, criterion, budget, floor=10, gradients=gradients)


# Through the stages of a run: what is trained, for how long, and resuming.

WAYS = {
    "joint": {"criterion": "joint", "budget": "global", "schedule": "gradual"},
    "learned": {"criterion": "joint", "budget": "learned"},
    "score": {"criterion": "score", "budget": "global", "schedule": "gradual", "floor": 6},
    "magnitude": {"criterion": "magnitude", "budget": "global", "schedule": "gradual"},
    "taylor": {"criterion": "taylor", "budget": "erk", "schedule": "gradual", "pattern": "2:4"},
    "snip": {"criterion": "snip", "budget": "global"},
    "rewound": {"criterion": "magnitude", "schedule": "iterative"},
    "jointly-rewound": {"criterion": "joint", "schedule": "iterative", "pattern": "1:4"},
}


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits", seed=0)
    few = dataclasses.replace(data.train, x=data.train.x[:256], y=data.train.y[:256])
    return dataclasses.replace(data, train=few)


def recipe(folder, **changes):
    stage = {"epochs": 4, "batch_size": 64}
    return parse_recipe(
        {
            "name": "ways",
            "output": str(folder),
            "threads": 1,
            "data": {"name": "digits"},
            "model": {"name": "mlp", "hidden": [24], "batch_norm": True},
            "objective": {"name": "ibp", "eps": 0.02},
            "pretrain": {**stage, "optimizer": {"name": "adam", "lr": 1e-2}},
            "prune": {**stage, "optimizer": {"name": "sgd", "lr": 1.0}, "weights": {"name": "adam", "lr": 1e-3}},
            "finetune": {**stage, "epochs": 2},
            "variants": [{"dense": True}, *({"sparsity": 0.9, "name": name, **way} for name, way in WAYS.items())],
            **changes,
        }
    )


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    run = start_run(recipe(tmp_path_factory.mktemp("ways") / "run"), "test", 1, "cpu")
    run_stages(run, digits, torch.device("cpu"))
    return run


class StopAfter(Progress):
    """A kill at the end of the epoch `number` of the stage whose title ends with `stage`."""

    def __init__(self, stage, number):
        self.stage, self.number, self.title = stage, number, ""

    def begin(self, title, total, done=0):
        self.title = title

    def epoch(self, number, epochs, row):
        if self.title.endswith(self.stage) and number == self.number:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", sorted(WAYS))
def test_a_run_keeps_what_was_asked_and_trains_as_long_as_all(name, whole):
    variant = whole.recipe.variant(name)
    record = whole.stage_record("finetune", name)
    assert record["sparsity"] == whole.stage_record("prune", name)["sparsity"]
    assert record["sparsity"]["total"] == pytest.approx(0.9, abs=0.001)
    assert len(record["sparsity"]["layers"]) == 2
    epochs = {name: [stage_epochs(whole.recipe, stage, v) for stage in ("prune", "finetune")]
              for name, v in (("it", variant), ("dense", whole.recipe.variant("dense")))}  # fmt: skip
    assert sum(epochs["it"]) == sum(epochs["dense"]) == 6
    first, pruned = (whole.load_model(*of).state_dict() for of in ((), (name, "prune")))
    masks = whole.load_masks(name)
    moved = any(not pruned[key].equal(first[key] * masks[key] if key in masks else first[key]) for key in first)
    assert moved == variant.trains[1]  # weights, biases and running statistics, if it trains them; else to the bit
    assert variant.trains[1] == any("running_mean" in key and not pruned[key].equal(first[key]) for key in first)
    assert [len(whole.stage_record("prune", name)["sparsity"]["layers"]), epochs["it"][0]] == [
        2,
        4 * any(variant.trains),
    ]


@pytest.mark.parametrize("name", sorted(WAYS))
def test_a_resumed_prune_stage_ends_with_the_same_bits(name, whole, digits, tmp_path):
    if not any(whole.recipe.variant(name).trains):
        pytest.skip("its prune stage trains nothing")
    run = start_run(
        recipe(tmp_path / "run", variants=[{"sparsity": 0.9, "name": name, **WAYS[name]}]), "test", 1, "cpu"
    )
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run_stages(run, digits, torch.device("cpu"), progress=StopAfter("prune", stop))
        torch.manual_seed(stop)
    run_stages(run, digits, torch.device("cpu"))
    for stage in ("prune", "finetune"):
        for file in ("model", "masks"):
            ours, other = (r.stage_folder(stage, name) / f"{file}.safetensors" for r in (run, whole))
            assert ours.read_bytes() == other.read_bytes(), (stage, file)


def test_an_epoch_short_of_the_final_sparsity_is_never_selected(whole):
    for name in ("joint", "score", "magnitude", "rewound"):
        rows = [line for line in (whole.stage_folder("prune", name) / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 4 and '"selected": false' in rows[0] and '"selected": false' in rows[1]
        assert whole.stage_record("prune", name)["selected_epoch"] >= 3


def test_rewinding_goes_back_to_the_pretrained_weights():
    net = sparsify(tiny_conv(), 0.9, "magnitude", "erk")
    masker = Masker(net, Pruning(0.9, "magnitude", "erk"), SCHEDULES["iterative"](rounds=2))
    fresh = tiny_conv()
    for step in range(4):
        rewound = masker.begin_step(step, 4, loss)
        assert rewound == (step == 2)
        same = torch.equal(net[5].bias, fresh[5].bias)
        assert same == (step in (0, 2))
        with torch.no_grad():
            net[5].bias += 1
            net[5].parametrizations.weight.original += torch.rand(20, 96, generator=torch.Generator().manual_seed(step))
    assert masker.progress(1, 4) == masker.progress(3, 4) == 0.5


def test_rewinding_voids_what_the_optimizer_remembers(tmp_path):
    """Two rounds over one and the same batch are the same steps twice, since no momentum is carried over."""
    net = sparsify(tiny_conv(), 0.9, "magnitude", "erk")
    split = Split(X, Y)
    seen = []

    class Rewinding(Masker):
        def begin_step(self, step, steps, loss):
            seen.append(net[5].bias.detach().clone())
            rewound = step == 3
            if rewound:
                self._rewind()
                seen.append(net[5].bias.detach().clone())
            return rewound

    def cross_entropy(model, x, y, progress):
        return nn.functional.cross_entropy(model(x), y), {}

    masker = Rewinding(net, Pruning(0.9, "magnitude", "erk"), SCHEDULES["iterative"](rounds=2))
    settings = StageSettings(epochs=6, batch_size=8, optimizer=SGD(name="sgd"), schedule=Constant(name="constant"))
    groups = [Group(list(net.parameters()), settings.optimizer)]
    data = SimpleNamespace(train=split, validation=split, extra=0, extra_share=0.0, augment=())
    train(net, groups, cross_entropy, data, Plan("prune", settings, 6), tmp_path, masker=masker)
    first, second = seen[:3], seen[4:]
    assert len(second) == 3 and not torch.equal(first[0], first[2])
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
