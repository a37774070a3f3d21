"""BatchNorm over all processes: what several of them train is what one trains on the whole batches."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from certifiers.bounds import Region, propagate, trace
from certifiers.errors import InputError, UnsupportedLayer
from certifiers.threat import LinfBall
from certprune import batch_norm
from certprune.batch_norm import SynchronisedBatchNorm1d, synchronised
from certprune.models import build_model
from certprune.objectives import build_objective
from certprune.parallel import world
from certprune.progress import Progress
from certprune.recipes import differences, dump_recipe, load_recipe
from certprune.runs import open_run
from certprune.speed import Step
from certprune.stage_settings import SpeedSettings

from .test_parallel import ROOT, alone, assert_alike, started, torchrun

SMOKE = ROOT / "configs" / "smoke.yaml"
# Not Adam: the gradient of a bias before BatchNorm is zero but for rounding, of which Adam makes whole steps.
RECIPE = ["sync_batch_norm=true", "pretrain.epochs=1", "variants=[{criterion: score, sparsity: 0.8}]"]
RECIPE += [f"{stage}.batch_size=256" for stage in ("pretrain", "prune", "finetune")]
RECIPE += [f"{stage}.optimizer={{name: sgd, lr: 0.02}}" for stage in ("pretrain", "finetune")]
RECIPE += ["objective.warm_up.weight=0", "model={name: cnn7, width: 0.05}"]
RECIPE += ["certify.count=1", "certify.methods=[ibp]", "certify.attack_steps=1"]
# Objectives that draw nothing at random and are means over images; networks with and without shortcuts.
QUIET = {"eps": 0.02, "steps": 2, "random_start": False}
STEPS = {
    "benign": ({"name": "benign"}, "wrn_28_4", 0.06),
    "adversarial": ({"name": "adversarial", **QUIET}, "resnet18", 0.06),
    "ibp": ({"name": "ibp", "eps": 0.02, "warm_up": {"weight": 0.0}}, "cnn7", 0.05),
    "crown_ibp": ({"name": "crown_ibp", "eps": 0.02, "warm_up": {"weight": 0.0}}, "cnn7", 0.05),
}
WORKER = """
import sys
import torch
from certprune.parallel import joined
from tests.test_batch_norm import STEPS, steps

with joined(torch.device("cpu")) as among:
    found = {f"{name}/{key}": value for name in STEPS for key, value in steps(name).items()}
    if among.leads:
        torch.save(found, sys.argv[1])
"""


def steps(name, count=3):
    """The network after a few steps of the processes there are, in double precision."""
    settings, architecture, width = STEPS[name]
    torch.manual_seed(0)
    model = build_model(architecture, (1, 8, 8), 10, width=width).double().train()
    objective, x, y = build_objective(settings), torch.rand(count, 12, 1, 8, 8).double(), torch.randint(10, (count, 12))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with synchronised(model):
        for part, labels in world().parts(zip(x, y, strict=True)):
            optimizer.zero_grad()
            objective(model, part, labels, 0.5)[0].backward()
            world().average_gradients(list(model.parameters()))
            optimizer.step()
    return model.state_dict()


def test_two_processes_take_the_steps_of_one(tmp_path):
    done = torchrun(tmp_path / "found.pt", 2, script=WORKER)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name in STEPS:
        for key, value in steps(name).items():
            torch.testing.assert_close(found[f"{name}/{key}"], value, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_with_batch_norm(tmp_path):
    two = started(tmp_path / "two", RECIPE)
    done = torchrun(two.folder, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_alike(alone(tmp_path / "one", RECIPE), open_run(two.folder))


# As if there were two processes, of which this one is the first


@pytest.fixture
def two(monkeypatch):
    """Call it with the other process's figures, one tensor for each BatchNorm in turn."""

    def pretend(others=()):
        waiting = list(others)
        fake = SimpleNamespace(size=2, all_of=lambda figures: torch.stack([figures, waiting.pop(0)]))
        monkeypatch.setattr(batch_norm, "world", lambda: fake)

    return pretend


def moments(x):
    axes = [0, *range(2, x.dim())]
    return torch.stack([x.mean(axes), x.var(axes, unbiased=False)])


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5), (6, 3, 2, 2, 2)])
def test_a_layer_normalises_its_part_as_the_whole_batch_is(two, shape):
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    torch.manual_seed(0)
    layer, whole = kind(3), torch.randn(shape) * 3 + 2
    nn.init.uniform_(layer.weight), nn.init.uniform_(layer.bias)
    plain = copy.deepcopy(layer)
    expected = plain(whole)
    two([moments(whole[1::2])])
    with synchronised(layer):
        found = layer(whole[0::2])
    torch.testing.assert_close(found, expected[0::2])
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_bounds_take_the_statistics_of_the_whole_batch(two):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).train()
    whole = torch.rand(8, 1, 2, 2)
    plain = copy.deepcopy(model)

    def logits_and_boxes(net, x):
        network = trace(net, (1, 2, 2)).bind(x)
        box = propagate(network, Region.of(x, LinfBall(0.1))).boxes[-1]
        return network.logits, box.centre, box.radius

    logits, centre, radius = logits_and_boxes(plain, whole)
    two([moments(model[1](whole[1::2].flatten(1)))])
    with synchronised(model):
        found = logits_and_boxes(model, whole[0::2])
    for ours, theirs in zip(found, (logits, centre, radius), strict=True):
        torch.testing.assert_close(ours, theirs[0::2])
    torch.testing.assert_close(model[2].running_var, plain[2].running_var)


def test_evaluation_asks_nobody_and_layers_are_given_back(two):
    layer, x = nn.BatchNorm1d(2), torch.rand(3, 2)
    expected = copy.deepcopy(layer).eval()(x)
    two()  # nobody answers
    with pytest.raises(KeyError), synchronised(layer):
        assert type(layer) is SynchronisedBatchNorm1d and layer.eval()(x).equal(expected)
        raise KeyError
    assert type(layer) is nn.BatchNorm1d


def test_bfloat16_in_and_out_with_exact_statistics(two):
    layer, x = nn.BatchNorm1d(2), torch.rand(64, 2).bfloat16()
    two([moments(x.float())])
    with synchronised(layer):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(layer.running_mean, 0.1 * x.float().mean(0))


def test_it_is_not_compiled(two):
    """A process that fails to compile would leave the others waiting."""

    class Notes(Progress):
        def note(self, text):
            assert "sync_batch_norm" in text and "goes on without" in text
            raise KeyError

    model, x = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.rand(3, 1, 2, 2)
    two()
    step = Step(model, build_objective({"name": "benign"}), SpeedSettings(compile=True), progress=Notes())
    with pytest.raises(KeyError), synchronised(model):
        step(x, torch.zeros(3, dtype=torch.int64), 1.0)


def test_alone_nothing_changes():
    layer = nn.BatchNorm1d(2)
    with synchronised(layer):
        assert type(layer) is nn.BatchNorm1d


def test_a_batch_norm_of_ones_own_is_refused(two):
    class Own(nn.BatchNorm2d):
        pass

    two()
    with pytest.raises(InputError, match="sync_batch_norm.*has a Own"), synchronised(nn.Sequential(Own(3))):
        pass


def test_recipes_name_it_where_it_is_asked_for():
    plain, asked = load_recipe(SMOKE), load_recipe(SMOKE, ["sync_batch_norm=true"])
    assert "sync_batch_norm" not in dump_recipe(plain) and "sync_batch_norm: true" in dump_recipe(asked)
    assert differences(plain, asked) == ["sync_batch_norm: false -> true"]


def test_a_batch_norm_of_ones_own_has_no_bounds_whatever_its_methods_are_called():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            y = super().forward(x)
            return y + (y > 50)  # where no comparison at a few points looks

        def batch_statistics(self, value):
            raise NotImplementedError

    with pytest.raises(UnsupportedLayer):
        trace(nn.Sequential(nn.Conv2d(1, 2, 3), Own(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)).eval(), (1, 8, 8))
