"""The epoch loop: what it trains, which epoch it keeps, and that a cut makes no difference to any bit."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from certifiers.errors import InputError
from certprune.optimizers import Group
from certprune.progress import Progress
from certprune.stage_settings import SGD, Adam, Constant, Cosine, StageSettings, Step
from certprune.training import Plan, learning_rate, train

CPU = torch.device("cpu")


def make_data(train_images=50, validation_images=20):
    generator = torch.Generator().manual_seed(3)

    def split(count):
        x = torch.rand(count, 1, 4, 4, generator=generator)
        return SimpleNamespace(x=x, y=(x.flatten(1)[:, :8].sum(1) > 4).long())

    plain = {"augment": (), "extra": 0, "extra_share": 0.0}
    return SimpleNamespace(train=split(train_images), validation=split(validation_images), **plain)


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


def cross_entropy(model, x, y, progress):
    logits = model(x)
    accuracy = (logits.argmax(1) == y).float().mean()
    return F.cross_entropy(logits, y), {"clean_accuracy": accuracy, "eps": torch.tensor(0.1 * progress)}


def make_plan(epochs=4, **changes):
    plan = {"batch_size": 16, "optimizer": Adam(lr=0.01), "epochs": epochs, **changes}
    return Plan(stage="pretrain", settings=StageSettings(**plan), epochs=epochs)


def run(folder, model=None, objective=cross_entropy, data=None, plan=None, progress=None):
    model = model or make_model()
    parameters = list(model.parameters())
    return model, train(
        model,
        [Group(parameters, (plan or make_plan()).settings.optimizer)],
        objective,
        data or make_data(),
        plan or make_plan(),
        folder,
        progress,
    )


class StopAfter(Progress):
    """A kill at an epoch's boundary, seen from inside."""

    def __init__(self, epoch):
        self.stop = epoch

    def epoch(self, number, epochs, row):
        if number == self.stop:
            raise KeyboardInterrupt


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "optimizer",
    [Adam(lr=0.01, weight_decay=0.1), SGD(name="sgd", lr=0.05)],
    ids=lambda optimizer: optimizer.name,
)
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, optimizer):
    plan = make_plan(optimizer=optimizer, ramp=True)
    whole, result = run(tmp_path / "whole", plan=plan)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", plan=plan, progress=StopAfter(stop))
        torch.manual_seed(stop)  # whatever the next process's random state is
    resumed, again = run(tmp_path / "cut", plan=plan)
    assert same(bits(whole), bits(resumed))
    for one, other in zip(result.history, again.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_finished_training_is_not_done_again(tmp_path):
    once, _ = run(tmp_path)
    calls = []

    def counting(model, x, y, progress):
        calls.append(progress)
        return cross_entropy(model, x, y, progress)

    again, _ = run(tmp_path, objective=counting)
    assert calls == [] and same(bits(once), bits(again))


def test_the_epoch_with_the_lowest_validation_loss_is_kept(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 1.0, float("nan")])  # the second; a tie later does not count, nor does nan
    after = []

    def scripted(model, x, y, progress):
        if torch.is_grad_enabled():
            return cross_entropy(model, x, y, progress)
        after.append(bits(model))
        return torch.tensor(next(losses)), {}

    data = make_data(validation_images=10)  # one batch
    model, result = run(tmp_path, objective=scripted, data=data, plan=make_plan(5))
    assert result.selected_epoch == 2 and result.validation == {"loss": 1.0}
    assert same(bits(model), after[1]) and not same(after[1], after[4])
    assert [row["selected"] for row in result.history] == [True, True, False, False, False]


def test_progress_ramps_in_training_and_is_final_in_validation(tmp_path):
    seen = {True: [], False: []}

    def spying(model, x, y, progress):
        seen[torch.is_grad_enabled()].append(progress)
        return cross_entropy(model, x, y, progress)

    run(tmp_path / "ramp", objective=spying, plan=make_plan(2, ramp=True))
    assert seen[True] == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]  # 50 images: three batches of 16 an epoch
    assert set(seen[False]) == {1.0}
    seen[True].clear()
    run(tmp_path / "flat", objective=spying, plan=make_plan(2))
    assert set(seen[True]) == {1.0}


def test_batches_are_whole_unless_there_is_only_one(tmp_path):
    sizes = []

    def spying(model, x, y, progress):
        if torch.is_grad_enabled():
            sizes.append(len(y))
        return cross_entropy(model, x, y, progress)

    run(tmp_path / "many", objective=spying, plan=make_plan(1))
    assert sizes == [16, 16, 16]
    sizes.clear()
    run(tmp_path / "few", objective=spying, plan=make_plan(1), data=make_data(5))
    assert sizes == [5]


def test_each_epoch_sees_each_image_at_most_once_in_a_new_order(tmp_path):
    data = make_data(48)
    numbers = {image.numpy().tobytes(): i for i, image in enumerate(data.train.x)}
    seen = []

    def spying(model, x, y, progress):
        if torch.is_grad_enabled():
            seen.extend(numbers[image.numpy().tobytes()] for image in x)
        return cross_entropy(model, x, y, progress)

    run(tmp_path, objective=spying, data=data, plan=make_plan(2))
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48))
    assert seen[:48] != seen[48:] and seen[:48] != list(range(48))


def test_only_the_given_parameters_move(tmp_path):
    model = make_model()
    before = bits(model)
    parameters = [model[1].weight]
    plan = Plan("prune", make_plan().settings, epochs=2, batch_statistics=False)
    train(model, [Group(parameters, plan.settings.optimizer)], cross_entropy, make_data(), plan, tmp_path)
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"1.weight"}  # nor do batch normalisation's running statistics


def test_running_statistics_move_when_batch_normalisation_learns(tmp_path):
    before = bits(make_model())
    model, _ = run(tmp_path)
    assert not torch.equal(model.state_dict()["2.running_mean"], before["2.running_mean"])


def test_the_gradient_is_clipped_by_its_norm(tmp_path):
    def steep(model, x, y, progress):
        return 1000 * cross_entropy(model, x, y, progress)[0], {}

    def distance(clip):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        optimizer = SGD(name="sgd", lr=0.1, momentum=0.0)
        schedule = Constant(name="constant")
        plan = make_plan(1, optimizer=optimizer, clip_gradient=clip, batch_size=50, schedule=schedule)
        run(tmp_path / str(clip), model=model, objective=steep, plan=plan)
        return (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()

    assert distance(2.0) == pytest.approx(0.2, rel=1e-4)
    assert distance(None) > 1


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_epoch(tmp_path, spoil):
    def spoilt(model, x, y, progress):
        loss, figures = cross_entropy(model, x, y, progress)
        if progress >= 0.5 and torch.is_grad_enabled():
            weight = model[1].weight
            # sqrt has an infinite slope at 0: a finite loss with a gradient that is not
            loss = loss * torch.nan if spoil == "loss" else loss + (weight - weight.detach()).square().sum().sqrt()
        return loss, figures

    with pytest.raises(InputError, match=rf"(?s){spoil}.*epoch 3.*epoch 2 is kept.*learning rate"):
        run(tmp_path, objective=spoilt, plan=make_plan(4, ramp=True))
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert kept["epoch"] == 2 and all(torch.isfinite(t).all() for t in kept["model"].values())


def test_metrics_have_a_line_an_epoch(tmp_path):
    _, result = run(tmp_path, plan=make_plan(3, ramp=True))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [row["epoch"] for row in rows] == [1, 2, 3] and [row["step"] for row in rows] == [3, 6, 9]
    assert rows[0]["lr"] > rows[2]["lr"] > 0
    assert rows[0]["train"]["eps"] == pytest.approx(0.1 * (0 + 1 + 2) / 9 / 3)
    assert rows[0]["validation"]["eps"] == pytest.approx(0.1)
    assert result.seconds == sum(row["seconds"] for row in rows)


def test_a_figure_that_some_batches_lack_is_averaged_over_the_others(tmp_path):
    def sometimes(model, x, y, progress):
        loss, _ = cross_entropy(model, x, y, progress)
        return loss, {"extra": torch.tensor(6.0)} if progress == 0 else {}

    _, result = run(tmp_path, objective=sometimes, plan=make_plan(2, ramp=True))
    assert result.history[0]["train"]["extra"] == 6.0 and "extra" not in result.history[1]["train"]


def test_no_epochs_leave_the_weights_and_are_judged(tmp_path):
    before = bits(make_model())
    model, result = run(tmp_path, plan=make_plan(0))
    assert same(before, bits(model)) and result.selected_epoch == 0 and result.validation["loss"] > 0
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_learning_rates():
    assert learning_rate(Constant(name="constant"), 0.1, 0.7) == 0.1
    assert learning_rate(Cosine(), 0.1, 0.0) == 0.1
    assert learning_rate(Cosine(), 0.1, 0.5) == pytest.approx(0.05)
    assert learning_rate(Cosine(final=0.2), 0.1, 1.0) == pytest.approx(0.02)
    step = Step(name="step", milestones=(0.5, 0.75), factor=0.1)
    rates = [learning_rate(step, 1.0, progress) for progress in (0.0, 0.49, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def _empty(path):
    path.write_bytes(b"")


def _foreign_tensor(path):
    torch.save(torch.zeros(3), path)


def _pickle(path):
    torch.save({"format": StopAfter(1)}, path)


def _other_stage(path):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "stage": "finetune"}, path)


def _other_network(path):
    state = torch.load(path, weights_only=True)
    state["model"]["1.weight"] = torch.zeros(9, 16)
    torch.save(state, path)


def _more_epochs(path):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "epoch": 99}, path)


def test_a_state_of_another_objective_is_not_gone_on_from(tmp_path):
    def plan(objective):
        return replace(make_plan(), objective=objective)

    weak, strong = ({"name": "crown_ibp", "eps": eps, "ramp": {"end": 0.5}} for eps in (0.1, 0.3))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan=plan(weak), progress=StopAfter(2))
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(InputError, match="should have eps 0.3, but the file was trained with eps 0.1.*Delete the file"):
        run(tmp_path, plan=plan(strong))
    with pytest.raises(InputError, match="should have name 'benign', but .* name 'crown_ibp'") as caught:
        run(tmp_path, plan=plan({"name": "benign"}))
    assert str(caught.value).count("state.pt") == 1, "said once"
    assert (tmp_path / "state.pt").read_bytes() == before
    # A setting that came with a later version had its default's meaning before, too.
    _, result = run(tmp_path, plan=plan({**weak, "new": 1}))
    assert len(result.history) == 4


def test_a_state_of_old_says_nothing_of_its_objective(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=StopAfter(2))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["objective"]
    torch.save(state, tmp_path / "state.pt")
    _, result = run(tmp_path, plan=replace(make_plan(), objective={"name": "benign"}))
    assert len(result.history) == 4


@pytest.mark.parametrize(
    "spoil", [_truncate, _empty, _foreign_tensor, _pickle, _other_stage, _other_network, _more_epochs]
)
def test_a_state_that_cannot_be_gone_on_from_is_left_alone(tmp_path, spoil):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=StopAfter(2))
    path = tmp_path / "state.pt"
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"(?s)state\.pt.*Nothing was changed.*Delete"):
        run(tmp_path)
    assert path.read_bytes() == before
