"""Adversarial training on digits: it makes robust, it replays minibatches, and it resumes to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certifiers.attack import attack
from certifiers.threat import threat
from certprune.data import Split, load_data
from certprune.objectives import build_objective
from certprune.optimizers import Group
from certprune.progress import Progress
from certprune.stage_settings import Adam, StageSettings
from certprune.training import Plan, train

NAMES = ("adversarial", "trades", "free")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10))


def trained(settings, data, folder, epochs=2, model=None, progress=None, **plan):
    model = model or small_net()
    stage = StageSettings(epochs=epochs, batch_size=64, optimizer=Adam(lr=1e-2))
    plan = Plan("pretrain", stage, epochs, **plan)
    result = train(
        model,
        [Group(list(model.parameters()), plan.settings.optimizer)],
        build_objective(settings),
        data,
        plan,
        folder,
        progress,
    )
    return model.eval(), result


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_training_raises_the_accuracy_under_attack(norm, digits, tmp_path):
    eps = {"linf": 0.12, "l2": 0.7}[norm]
    ball, x, y = threat(norm, eps), digits.validation.x, digits.validation.y

    def under_attack(settings):
        model, result = trained(settings, digits, tmp_path / settings["name"], epochs=5)
        _, success = attack(model, x, y, ball, steps=10)
        return 1 - success.float().mean().item(), result

    benign, _ = under_attack({"name": "benign"})
    for name in NAMES:
        robust, result = under_attack({"name": name, "eps": eps, "norm": norm})
        assert robust > benign + 0.05, (name, robust, benign)
        # The quick attack of the validation finds fewer wrong predictions than the better one, but many.
        assert robust - 0.01 <= result.validation["attack_accuracy"] < result.validation["clean_accuracy"] - 0.05


def test_replays_keep_the_number_of_steps(digits, tmp_path):
    seen = []

    class Spy:
        replays = 3

        def begin_epoch(self):
            seen.append("epoch")

        def __call__(self, model, x, y, progress):
            if torch.is_grad_enabled():
                seen.append(x.sum().item())
            return F.cross_entropy(model(x), y), {}

    few = dataclasses.replace(digits, train=Split(digits.train.x[:130], digits.train.y[:130]))
    stage = StageSettings(epochs=2, batch_size=32, optimizer=Adam(lr=5e-3))
    model = small_net()
    result = train(
        model, [Group(list(model.parameters()), stage.optimizer)], Spy(), few, Plan("pretrain", stage, 2), tmp_path
    )
    assert [row["step"] for row in result.history] == [4, 8]
    (first, second), (third, fourth) = seen[1:5:3], seen[6:10:3]
    assert seen == ["epoch", first, first, first, second, "epoch", third, third, third, fourth]
    assert len({first, second, third, fourth}) == 4


class StopAfter(Progress):
    """A kill at an epoch's boundary, seen from inside."""

    def __init__(self, epoch):
        self.stop = epoch

    def epoch(self, number, epochs, row):
        if number == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_ends_with_the_same_bits(name, digits, tmp_path):
    settings = {"name": name, "eps": 0.1}
    whole, result = trained(settings, digits, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(settings, digits, tmp_path / "cut", progress=StopAfter(1))
    torch.manual_seed(7)  # whatever the next process's random state is
    resumed, again = trained(settings, digits, tmp_path / "cut")
    ours, other = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[key], other[key]) for key in ours)
    for one, other in zip(result.history, again.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
