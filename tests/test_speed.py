"""Faster steps are the same steps: parts, bfloat16, layouts, compilation; nothing but training is touched."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from certifiers.errors import InputError
from certprune import speed as speeds
from certprune.masks import sparsify
from certprune.objectives import OBJECTIVES, build_objective, needs_bounds
from certprune.optimizers import Group
from certprune.progress import Progress
from certprune.recipes import differences, dump_recipe, load_recipe
from certprune.speed import Step
from certprune.stage_settings import Adam, SpeedSettings, StageSettings
from certprune.stages import check_network
from certprune.training import Plan, train

from .test_objectives import ALL
from .test_recipes_matrix import ROOT

# A mean over images, without BatchNorm and without a draw of its own (the attack from the image itself).
MEANS = {
    "benign": {"name": "benign"},
    "adversarial": {"name": "adversarial", "eps": 0.05, "steps": 2, "random_start": False},
    "ibp": {"name": "ibp", "eps": 0.05, "warm_up": {"weight": 0.0}},
    "crown_ibp": {"name": "crown_ibp", "eps": 0.05, "warm_up": {"weight": 0.0}},
}
SHAPE = (1, 8, 8)


def network(masked=False, batch_norm=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1)]
    if not batch_norm:
        del layers[1]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).train()
    return sparsify(model, 0.5, "score") if masked else model


def batch(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, *SHAPE, generator=generator), torch.randint(10, (count,), generator=generator)


def gradients(model, settings, progress=0.4, **speed):
    """The gradients of one step by name, and the step's figures."""
    torch.manual_seed(2)
    model.zero_grad()
    step = Step(model, build_objective(settings), SpeedSettings(**speed))
    found = step(*batch(), progress)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, found


def assert_close(ours, others, tolerance=1e-5):
    assert ours.keys() == others.keys() and ours
    for name in ours:
        assert (ours[name] - others[name]).abs().max() <= tolerance * (1e-3 + others[name].abs().max()), name


def split(count):
    x, y = batch(count)
    return SimpleNamespace(x=x, y=y)


def trained(folder, model=None, objective=None, epochs=2, progress=None, ramp=True, **speed):
    model, data = model or network(), SimpleNamespace(train=split(32), validation=split(8), augment=(), extra=0)
    data.extra_share = 0.0
    settings = StageSettings(batch_size=16, optimizer=Adam(lr=0.01), epochs=epochs, ramp=ramp)
    plan = Plan("pretrain", settings, epochs, speed=SpeedSettings(**speed))
    groups = [Group(list(model.parameters()), settings.optimizer)]
    result = train(model, groups, objective or build_objective(MEANS["benign"]), data, plan, folder, progress)
    return model, result


# Parts


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", MEANS)
def test_parts_give_the_gradient_of_the_whole(name, masked):
    model = network(masked)
    whole, figures = gradients(model, MEANS[name])
    parts, each = gradients(model, MEANS[name], accumulate=3)
    assert_close(parts, whole)
    assert len(figures) == 1 and len(each) == 3
    mean = sum(part["loss"] for part in each) / 3
    assert mean.item() == pytest.approx(figures[0]["loss"].item(), rel=1e-5)


def test_parts_give_the_weights_of_the_whole_and_goes_on_from_a_cut(tmp_path):
    class Stop(Progress):
        def epoch(self, number, epochs, row):
            raise KeyboardInterrupt

    whole, one = trained(tmp_path / "whole")
    parts, two = trained(tmp_path / "parts", accumulate=4)
    assert_close(parts.state_dict(), whole.state_dict(), 1e-4)
    assert two.history[0]["train"]["loss"] == pytest.approx(one.history[0]["train"]["loss"], rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", accumulate=4, progress=Stop())
    resumed, _ = trained(tmp_path / "cut", accumulate=4)
    assert all(resumed.state_dict()[name].equal(value) for name, value in parts.state_dict().items())


def test_a_batch_that_cannot_be_parted_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"16 images.*accumulate = 3.*batch_size"):
        trained(tmp_path, accumulate=3)


# bfloat16


@pytest.mark.parametrize("name", sorted(name for name in ALL if not needs_bounds(build_objective(ALL[name]))))
def test_bfloat16_is_nearly_the_step_of_float32_with_losses_in_float32(name):
    steps = {"steps": 1} if "steps" in OBJECTIVES[name].model_fields else {}
    model, settings = network(masked=True), {**ALL[name], **steps}
    exact, _ = gradients(model, settings)
    rounded, (figures,) = gradients(model, settings, bf16=True)
    assert figures["loss"].dtype == torch.float32 and "forward" not in vars(model)
    for key, value in exact.items():
        assert rounded[key].dtype == torch.float32 and not rounded[key].equal(value)
    ours, others = (torch.cat([value.flatten() for value in found.values()]) for found in (rounded, exact))
    if name in ("benign", "gaussian"):  # attacks may turn another way
        assert (ours - others).norm() < 0.05 * others.norm()


def test_bfloat16_stays_out_of_validation(tmp_path):
    seen = {True: set(), False: set()}

    class Spy(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            seen[torch.is_grad_enabled()].add(out.dtype)
            return out

    model = nn.Sequential(Spy(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    model, _ = trained(tmp_path, model, bf16=True)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert model(batch()[0]).dtype == torch.float32  # what certification would see


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_an_objective_allows(name):
    objective = build_objective(ALL[name])
    model = network()
    if needs_bounds(objective):
        with pytest.raises(InputError, match=rf"bf16.*{name} is made of bounds.*adversarial"):
            Step(model, objective, SpeedSettings(bf16=True))
    if name == "free":
        with pytest.raises(InputError, match="accumulate is 2.*carries.*adversarial"):
            Step(model, objective, SpeedSettings(accumulate=2))
    Step(model, objective, SpeedSettings(channels_last=True, compile=True))


# Layout


@pytest.mark.parametrize("name", sorted(ALL))
def test_channels_last_is_the_same_step(name):
    model = network(masked=True, batch_norm=True)
    there = copy.deepcopy(model).to(memory_format=torch.channels_last)
    progress = 1.0  # all parts of every loss
    assert_close(gradients(there, ALL[name], progress)[0], gradients(model, ALL[name], progress)[0], 1e-4)


def test_channels_last_weights_are_laid_out_as_ever_afterwards(tmp_path):
    layouts = []

    class Spy(Progress):
        def epoch(self, number, epochs, row):
            layouts.append(model[2].weight.is_contiguous())

    model = network()
    there, _ = trained(tmp_path / "there", model, progress=Spy(), channels_last=True)
    plain, _ = trained(tmp_path / "plain")
    assert layouts == [False, False] and all(value.is_contiguous() for value in there.state_dict().values())
    assert_close(there.state_dict(), plain.state_dict(), 1e-4)


# Compilation. Mostly by a backend that compiles nothing, so that it takes no time.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(speeds, "BACKEND", "aot_eager")


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("name", ["adversarial", "crown_ibp"])
def test_a_compiled_step_is_the_same_step(name, quick, monkeypatch):
    calls, compile_it = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(k["backend"]) or compile_it(*a, **k))
    bounded = name == "crown_ibp"
    model, settings = network(masked=bounded, batch_norm=not bounded), ALL[name]
    twin, notes = copy.deepcopy(model), Notes()
    step = Step(model, build_objective(settings), SpeedSettings(compile=True), notes)
    plain = Step(twin, build_objective(settings))
    for progress in (0.0, 0.1, 0.3, 0.59, 0.7):  # the ramp ends at 0.6
        for net, take in ((model, step), (twin, plain)):
            torch.manual_seed(3)
            net.zero_grad()
            take(*batch(), progress)
        assert_close(*({n: p.grad for n, p in net.named_parameters()} for net in (model, twin)), 1e-4)
    for (key, ours), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, other, msg=key)  # running statistics: the trial left no trace
    assert notes.notes == [] and calls[-1] == "aot_eager" and step.compiled


@pytest.mark.parametrize(
    ("settings", "variants"),
    [
        (ALL["crown_ibp"], 2),
        ({**ALL["ibp"], "kappa": {"start": 0.5, "end": 0.5}, "norm": "l2"}, 2),
        ({**ALL["crown_ibp"], "beta": {"start": 0.0, "end": 1.0}, "fusion": False, "ramp": {"start": 0.3}}, 2),
        ({**ALL["ibp"], "ramp": {"start": 0.0, "end": 0.0}}, 1),
    ],
    ids=["crown_ibp", "ibp-l2", "margins", "no ramp"],
)
def test_bounds_are_compiled_once_for_a_ramp_and_once_for_its_end(settings, variants, monkeypatch):
    counted = []

    def count(graph, inputs):
        counted.append(graph)
        return graph.forward

    monkeypatch.setattr(speeds, "BACKEND", count)
    model, notes = network(batch_norm=True), Notes()
    model[0].register_parameter("bias", None)  # before BatchNorm its gradient is rounding alone
    twin = copy.deepcopy(model)
    step = Step(model, build_objective(settings), SpeedSettings(compile=True), notes)
    plain = Step(twin, build_objective(settings))
    for progress in (0.0, 0.01, 0.2, 0.31, 0.4999, 0.599999, 0.6, 0.8, 1.0):
        gradients = []
        for net, take in ((model, step), (twin, plain)):
            net.zero_grad()
            (figures,) = take(*batch(), progress)
            gradients.append(({n: p.grad for n, p in net.named_parameters()}, figures))
        assert_close(gradients[0][0], gradients[1][0], 1e-4)
        assert gradients[0][1].keys() == gradients[1][1].keys()
        for key, figure in gradients[1][1].items():
            torch.testing.assert_close(gradients[0][1][key], figure, rtol=1e-4, atol=1e-6, msg=f"{key} at {progress}")
    assert notes.notes == [] and step.compiled and len(counted) == variants


def test_a_step_that_cannot_be_compiled_is_taken_as_it_is_with_one_message(tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(speeds, "BACKEND", broken)
    notes = Notes()
    model, _ = trained(tmp_path / "asked", network(batch_norm=True), compile=True, progress=notes)
    plain, _ = trained(tmp_path / "plain", network(batch_norm=True))
    assert len(notes.notes) == 1 and "no C++ compiler" in notes.notes[0] and "goes on without" in notes.notes[0]
    assert all(model.state_dict()[name].equal(value) for name, value in plain.state_dict().items())


def test_a_compilation_that_fails_later_is_no_end_either(quick):
    model, notes = network(), Notes()
    step = Step(model, build_objective(MEANS["benign"]), SpeedSettings(compile=True), progress=notes)
    step(*batch(), 1.0)

    def fails(*_):
        raise RuntimeError("recompiled")

    step.losses = fails
    step(*batch(), 1.0)
    assert len(notes.notes) == 1 and not step.compiled
    expected, _ = gradients(network(), MEANS["benign"], 1.0)
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


def test_mistakes_of_the_user_are_not_taken_for_failures_of_the_compiler(quick):
    step = Step(network(), build_objective(MEANS["benign"]), SpeedSettings(compile=True))
    step(*batch(), 1.0)
    step.losses = lambda *_: (_ for _ in ()).throw(InputError("mine"))
    with pytest.raises(InputError, match="mine"):
        step(*batch(), 1.0)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["ibp", "adversarial"])
def test_a_compiled_training_resumes_to_the_bit(tmp_path, name):
    class Stop(Notes):
        def epoch(self, number, epochs, row):
            raise KeyboardInterrupt

    objective, notes = build_objective(ALL[name]), Notes()
    whole, _ = trained(tmp_path / "whole", objective=objective, progress=notes, compile=True, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", objective=objective, progress=Stop(), compile=True, epochs=3)
    resumed, _ = trained(tmp_path / "cut", objective=objective, progress=notes, compile=True, epochs=3)
    assert notes.notes == []
    assert all(resumed.state_dict()[name].equal(value) for name, value in whole.state_dict().items())
    plain, _ = trained(tmp_path / "plain", objective=objective, epochs=3)
    assert_close(whole.state_dict(), plain.state_dict(), 2e-2)


# Recipes


def recipe(*words):
    return load_recipe(ROOT / "configs" / "smoke.yaml", words)


def test_recipes_name_it_and_older_ones_stay_as_they_were():
    plain, fast = recipe(), recipe("speed.channels_last=true", "speed.compile=true")
    assert "speed" not in dump_recipe(plain)
    assert "channels_last: true" in dump_recipe(fast) and differences(plain, fast) == []
    slow = recipe("speed.accumulate=2")
    assert differences(plain, slow) == ["speed.accumulate: 1 -> 2"]
    with pytest.raises(InputError, match="speed.bf61"):
        recipe("speed.bf61=true")


def test_a_recipe_is_refused_before_training():
    asked = recipe("speed.bf16=true", "prune.objective={name: benign}")
    with pytest.raises(InputError, match="bf16"):
        check_network(asked, SimpleNamespace(shape=SHAPE, classes=10))
    words = ("speed.bf16=true", "objective={name: benign}", "certify.methods=[ibp]", "certify.eps=[0.01]")
    check_network(recipe(*words), SimpleNamespace(shape=SHAPE, classes=10))
