import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from certifiers.attack import attack
from certifiers.certification import CASCADE, METHODS, certify
from certifiers.errors import InputError, SoundnessError, UnsupportedLayer
from certifiers.exact import decide
from certifiers.fingerprint import model_hash
from certifiers.radius import certify_radii
from certifiers.smoothing import SmoothedClassifier
from certifiers.threat import L2Ball, LinfBall
from certifiers.verdict import Ledger, Status, Verdict, read_ledger, summarise
from tests.nets import CLASSES, NETS, images, tiny_mlp

OWN = ["ibp", "crown-ibp", "crown"]


def linear(weight: list[list[float]], bias: list[float]) -> nn.Module:
    layer = nn.Linear(len(weight[0]), len(weight)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=torch.float64))
        layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return layer.eval()


# At (0.5, 0.5, 0.5) the logits are 0.3, 0 and -20: label 0 is ahead of class 1 by 0.3, with the weight difference
# (1, -2, 2) of norms 5 (l1) and 3 (l2).
MODEL = linear([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0], [1.0, -2.5, 2.0]], [-0.2, 0.0, -20.25])
GREY, LABEL = torch.full((1, 3), 0.5, dtype=torch.float64), torch.tensor([0])


def data(name: str, n: int = 30) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A tiny net, images and the labels it gives them, the first three of them wrong."""
    model, (x, _) = NETS[name](), images(n)
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % CLASSES
    return model, x, y


def bare(verdicts: list[Verdict]) -> list[Verdict]:
    """Without what differs from run to run: the time, and the margin's last digits."""
    margins = [None if v.margin is None else round(v.margin, 4) for v in verdicts]
    return [replace(v, seconds=0.0, margin=margin) for v, margin in zip(verdicts, margins, strict=True)]


# ---- verdicts


@pytest.mark.parametrize(
    "ball, radius, method",
    # IBP works on the box of the l2 ball, so it is not exact there.
    [(LinfBall, 0.06, method) for method in OWN] + [(L2Ball, 0.1, method) for method in OWN[1:]],
)
def test_a_linear_model_is_decided_at_its_radius(ball, radius, method):
    (below,) = certify(MODEL, GREY, LABEL, ball(radius * (1 - 1e-6)), method)
    (above,) = certify(MODEL, GREY, LABEL, ball(radius * (1 + 1e-6)), method)
    assert (below.status, below.method) == (Status.certified, method)
    assert below.margin == pytest.approx(0.3e-6, rel=1e-3)
    assert (above.status, above.method, above.margin) == (Status.falsified, "attack", None)


def test_every_field_of_a_verdict():
    x, y = GREY.repeat(2, 1), torch.tensor([0, 1])
    right, wrong = certify(MODEL, x, y, LinfBall(0.02), indices=torch.tensor([40, 7]))
    assert right == Verdict(40, 0, 0, Status.certified, 0.02, "linf", "ibp", right.margin, right.seconds)
    assert right.margin == pytest.approx(0.2)  # 0.3 - 0.02 * 5
    assert wrong == Verdict(7, 1, 0, Status.misclassified, 0.02, "linf", "clean", None, wrong.seconds)
    assert list(right.stages) == ["clean", "attack", "ibp"] and list(wrong.stages) == ["clean"]
    assert right.seconds == pytest.approx(sum(right.stages.values())) and right.seconds > wrong.seconds > 0.0


@pytest.mark.parametrize("ball", [LinfBall(0.004), L2Ball(0.06)])
@pytest.mark.parametrize("name", NETS)
def test_verdicts_agree_with_the_network(name, ball):
    model, x, y = data(name)
    verdicts = certify(model, x, y, ball, attack_steps=10)
    assert [v.index for v in verdicts] == list(range(30))
    assert [v.prediction for v in verdicts] == model(x).argmax(1).tolist()
    assert [v.status is Status.misclassified for v in verdicts] == [True] * 3 + [False] * 27
    certified = [v.index for v in verdicts if v.status is Status.certified]
    assert certified and all(verdicts[i].margin > 0 for i in certified)
    noise = torch.rand(200, *x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    points = ball.project(x.repeat(200, 1, 1, 1), (x + ball.eps * noise.sign()).flatten(0, 1))
    predictions = model(points).argmax(1).view(200, 30)
    assert (predictions[:, certified] == y[certified]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bounds_that_are_not_finite_prove_nothing(monkeypatch, value):
    monkeypatch.setitem(METHODS, "ibp", lambda model, x, y, threat, *_: torch.full((len(x), 3), value))
    (verdict,) = certify(MODEL, GREY, LABEL, LinfBall(0.01), "ibp")
    assert (verdict.status, verdict.method, verdict.margin) == (Status.unknown, "ibp", None)
    (verdict,) = certify(MODEL, GREY, LABEL, LinfBall(0.01), ["ibp", "crown"])
    assert (verdict.status, verdict.method) == (Status.certified, "crown")


@pytest.mark.parametrize("claim", [0.0, 1e-13])
def test_a_tie_never_certifies(monkeypatch, claim):
    model = linear([[1.0], [1.0]], [0.0, 0.0])
    x = torch.tensor([[0.5]], dtype=torch.float64)
    monkeypatch.setitem(METHODS, "ibp", lambda model, x, y, threat, *_: torch.full((len(x), 2), claim).double())
    (first,) = certify(model, x, torch.tensor([0]), LinfBall(0.0), "ibp")
    (second,) = certify(model, x, torch.tensor([1]), LinfBall(0.0), "ibp")
    assert first.status is Status.unknown  # the claim is within rounding, so no contradiction either
    assert second.status is Status.misclassified


def test_one_class_that_is_not_proven_is_enough(monkeypatch):
    bounds = torch.tensor([[0.0, 0.1, -1e-9]], dtype=torch.float64)
    monkeypatch.setitem(METHODS, "ibp", lambda model, x, y, threat, *_: bounds)
    (verdict,) = certify(MODEL, GREY, LABEL, LinfBall(0.01), "ibp")
    assert (verdict.status, verdict.margin) == (Status.unknown, -1e-9)


def test_the_cascade_asks_the_next_method_only_about_what_is_open(monkeypatch):
    # Four inputs: the first is misclassified, the second falsified; "ibp" proves the third, "crown-ibp" the last.
    x = torch.tensor([[0.5] * 3, [0.44, 0.5, 0.5], [0.5] * 3, [0.5] * 3], dtype=torch.float64)
    y = torch.tensor([1, 0, 0, 0])
    asked = []

    def method(name: str, proven: list[float]):
        def bounds(model, x, y, threat, *_):
            asked.append((name, len(x)))
            return torch.tensor(proven[-len(x) :], dtype=torch.float64)[:, None].expand(len(x), 3)

        return bounds

    monkeypatch.setitem(METHODS, "ibp", method("ibp", [-1.0, 0.01, -1.0]))
    monkeypatch.setitem(METHODS, "crown-ibp", method("crown-ibp", [0.02]))
    monkeypatch.setitem(METHODS, "crown", method("crown", [0.03]))
    verdicts = certify(MODEL, x, y, LinfBall(0.05), "cascade")
    assert [(v.status.value, v.method, v.margin) for v in verdicts] == [
        ("misclassified", "clean", None),
        ("falsified", "attack", None),
        ("certified", "ibp", 0.01),
        ("certified", "crown-ibp", 0.02),
    ]
    assert asked == [("ibp", 3), ("crown-ibp", 1)]  # the first also about what is falsified, to catch it lying
    assert CASCADE == ("ibp", "crown-ibp", "crown", "alpha-crown")


def test_the_cascade_proves_what_its_methods_prove():
    model, x, y = data("mlp")
    threat = LinfBall(0.004)
    each = [{v.index for v in certify(model, x, y, threat, name) if v.status is Status.certified} for name in OWN]
    cascade = {v.index for v in certify(model, x, y, threat) if v.status is Status.certified}
    assert cascade == set.union(*each) and len(each[0]) < len(cascade)


@pytest.mark.parametrize("name", ["lirpa-crown", "lirpa-alpha-crown"])
def test_auto_lirpa_methods(name):
    pytest.importorskip("certifiers.lirpa")
    model, x, y = data("mlp", 8)
    verdicts = certify(model, x, y, LinfBall(0.004), name)
    assert {v.method for v in verdicts} <= {name, "attack", "clean"}
    own = certify(model, x, y, LinfBall(0.004), "crown")
    certified = {v.index for v in own if v.status is Status.certified}
    assert certified and certified <= {v.index for v in verdicts if v.status is Status.certified}


def test_batches_and_global_random_numbers_do_not_matter():
    model, x, y = data("conv")
    threat = LinfBall(0.01)
    torch.manual_seed(0)
    whole = certify(model, x, y, threat)
    torch.manual_seed(1)
    assert bare(certify(model, x, y, threat, batch_size=7)) == bare(whole)
    order = [5, 3, 20, 11]
    part = certify(model, x[order], y[order], threat, indices=order)
    assert bare(part) == bare([whole[i] for i in order])
    assert {v.status for v in whole} >= {Status.certified, Status.falsified}  # else this shows little


def test_attacks_go_by_the_number_in_the_data_set(monkeypatch):
    seen = []

    def spy(model, x, y, threat, steps, restarts, *, seed, indices):
        seen.append((steps, restarts, seed, list(indices)))
        return attack(model, x, y, threat, steps, restarts, seed=seed, indices=indices)

    monkeypatch.setattr(sys.modules["certifiers.cascade"], "attack", spy)
    model, x, y = data("mlp", 6)  # the first three are misclassified
    certify(model, x, y, LinfBall(0.0), attack_steps=3, attack_restarts=1, seed=5, batch_size=5, indices=range(70, 76))
    assert seen == [(3, 1, 5, [73, 74]), (3, 1, 5, [75])]


def test_the_model_and_inputs_stay_as_they_are():
    model, x, y = data("bn", 6)
    before, x_before = model_hash(model), x.clone()
    certify(model, x, y, LinfBall(0.01))
    assert model_hash(model) == before and torch.equal(x, x_before)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_progress_and_empty_input():
    model, x, y = data("mlp", 5)
    calls = []
    certify(model, x, y, LinfBall(0.0), batch_size=2, on_batch=lambda *call: calls.append(call))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert certify(model, x[:0], y[:0], LinfBall(0.0)) == []


# ---- what a certifier claims is checked


def always(value: float):
    return lambda model, x, y, threat, *_: torch.full((len(x), 3), value, dtype=x.dtype)


@pytest.mark.parametrize("eps", [0.01, 0.07])  # proven by others; broken by the attack
def test_a_wrong_certifier_is_found_out(monkeypatch, eps):
    monkeypatch.setitem(METHODS, "wrong", always(1.0))
    with pytest.raises(SoundnessError, match="wrong is unsound.*input 0 .*class 1.*at least 1"):
        certify(MODEL, GREY, LABEL, LinfBall(eps), "wrong")


def test_a_certifier_that_is_wrong_only_about_falsified_inputs_is_found_out(monkeypatch):
    # At eps 0.1 the true margin is -0.2; the claim 0.01 is below the clean margin, so only the attack betrays it.
    monkeypatch.setitem(METHODS, "wrong", always(0.01))
    with pytest.raises(SoundnessError, match="within linf 0.1, but an input that lies within has -"):
        certify(MODEL, GREY, LABEL, LinfBall(0.1), "wrong")


def test_a_wrong_bound_is_found_out_even_if_it_certifies_nothing(monkeypatch):
    wrong = torch.tensor([[0.0, -1.0, 20.5]], dtype=torch.float64)  # the margin to class 2 is 20.3 when clean
    monkeypatch.setitem(METHODS, "wrong", lambda model, x, y, threat, *_: wrong)
    with pytest.raises(SoundnessError, match="class 2"):
        certify(MODEL, GREY, LABEL, LinfBall(0.01), "wrong")


def test_a_later_method_is_checked_too(monkeypatch):
    monkeypatch.setitem(METHODS, "ibp", always(-math.inf))
    monkeypatch.setitem(METHODS, "wrong", always(0.31))
    with pytest.raises(SoundnessError, match="wrong is unsound"):
        certify(MODEL, GREY, LABEL, LinfBall(0.0), ["ibp", "wrong"])


def test_a_contradiction_goes_to_the_ledger_after_what_was_decided_before(monkeypatch, tmp_path):
    monkeypatch.setitem(
        METHODS, "wrong", lambda model, x, y, threat, *_: torch.where(x[:, :1] > 0.4, -1.0, 1.0).expand(len(x), 3)
    )
    x = torch.tensor([[0.5] * 3, [0.3, 0.5, 0.5]], dtype=torch.float64)
    path = tmp_path / "a.jsonl"
    threat = LinfBall(0.01)
    with Ledger(path, {"eps": 0.01, "norm": "linf"}) as ledger, pytest.raises(SoundnessError):
        certify(MODEL, x, torch.tensor([0, 0]), threat, "wrong", batch_size=1, ledger=ledger, indices=[8, 9])
    # Input 9 has the margin 0.1 when clean.
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and '"index": 8' in lines[1]
    assert '"contradiction"' in lines[2] and '"index": 9' in lines[2] and '"method": "wrong"' in lines[2]
    with pytest.raises(SoundnessError, match="contradicted"):
        read_ledger(path)


def test_rounding_is_no_contradiction(monkeypatch):
    model = nn.Linear(3, 3)
    model.load_state_dict({key: value.float() for key, value in MODEL.state_dict().items()})
    monkeypatch.setitem(METHODS, "ibp", always(0.3 + 1e-6))
    (verdict,) = certify(model.eval(), GREY.float(), LABEL, LinfBall(0.0), "ibp")
    assert verdict.status is Status.certified and verdict.margin <= 0.3 + 1e-6


# ---- the ledger


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    model, x, y = data("mlp")
    threat, header = LinfBall(0.004), {"model": model_hash(model), "eps": 0.004, "norm": "linf"}
    path = tmp_path / "a.jsonl"

    def interrupt(done: int, total: int) -> None:
        if done >= 14:
            raise KeyboardInterrupt

    with Ledger(path, header) as ledger, pytest.raises(KeyboardInterrupt):
        certify(model, x, y, threat, ledger=ledger, batch_size=7, on_batch=interrupt)
    assert len(read_ledger(path)[1]) == 14
    path.write_bytes(path.read_bytes()[:-10])  # the kill came while line 14 was written
    calls = []
    with Ledger(path, header) as ledger:
        kept = ledger.verdicts
        verdicts = certify(model, x, y, threat, ledger=ledger, batch_size=7, on_batch=lambda *call: calls.append(call))
        assert verdicts[:13] == kept  # taken from the ledger, seconds and all
        assert certify(model, x, y, threat, ledger=ledger) == verdicts
    assert calls == [(20, 30), (27, 30), (30, 30)]
    assert read_ledger(path)[1] == verdicts
    assert bare(verdicts) == bare(certify(model, x, y, threat, batch_size=7))
    assert summarise(verdicts).clean.count == 27


@pytest.mark.parametrize(
    "header, says",
    [
        ({"model": "0" * 64}, "for model 0000"),
        ({"eps": 0.5}, "for eps 0.5"),
        ({"norm": "l2"}, "for norm l2"),
    ],
)
def test_a_ledger_of_another_model_or_threat_set_is_refused(tmp_path, header, says):
    with Ledger(tmp_path / "a.jsonl", header) as ledger, pytest.raises(InputError, match=says):
        certify(MODEL, GREY, LABEL, LinfBall(0.1), ledger=ledger)
    assert read_ledger(tmp_path / "a.jsonl")[1] == []


def test_a_ledger_of_other_labels_is_refused(tmp_path):
    with Ledger(tmp_path / "a.jsonl", {}) as ledger:
        certify(MODEL, GREY, LABEL, LinfBall(0.1), ledger=ledger)
        with pytest.raises(InputError, match="label 0 for input 0, but label 1"):
            certify(MODEL, GREY, LABEL + 1, LinfBall(0.1), ledger=ledger)


def test_a_ledger_of_other_predictions_is_refused(tmp_path):
    class Signed(nn.Module):
        sign = 1.0

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return type(self).sign * self.fc(x)

    torch.manual_seed(0)
    model, x = Signed().eval(), torch.rand(5, 4)
    y = model(x).argmax(1)
    with Ledger(tmp_path / "a.jsonl", {}) as ledger:
        certify(model, x[:4], y[:4], LinfBall(0.001), ledger=ledger)
        certify(model, x, y, LinfBall(0.001), ledger=ledger)  # the same, and one more
        for images in (1 - x, x):
            with pytest.raises(InputError, match="other predictions"):
                Signed.sign = -1.0 if images is x else 1.0
                certify(model, images, y, LinfBall(0.001), ledger=ledger)


# ---- bad input


def train_one_layer(model):
    model[2].train()


def spoil(model):
    model[3].bias.data[2] = math.nan


def overflow(model):
    for layer in (1, 3, 5):
        model[layer].weight.data.fill_(1e30)


def mask(model):
    prune.l1_unstructured(model[1], "weight", 0.5)


@pytest.mark.parametrize(
    "change, says",
    [
        (nn.Module.train, r"model.eval\(\)"),
        (train_one_layer, r"layer 2 is in train mode.*model.eval\(\)"),
        (lambda model: parametrizations.orthogonal(model[1]), r"layer 1 has a parametrization.*materialize\(model\)"),
        (mask, "torch.nn.utils.prune.remove"),
        (spoil, "3.bias holds NaN"),
        (overflow, "output for input 0 is NaN or infinite"),
        (lambda model: model.append(nn.Flatten(0).eval()), r"shape \(batch, classes\).*gave shape \(10,\)"),
        (nn.Module.double, r"inputs are torch.float32.*torch.float64"),
    ],
)
def test_bad_models(change, says):
    model = tiny_mlp()
    change(model)
    with pytest.raises(InputError, match=says):
        certify(model, *images(2), LinfBall(0.1))


def test_a_spoilt_buffer_is_an_error():
    model = NETS["bn"]()
    model[1].running_mean[0] = math.inf
    with pytest.raises(InputError, match="1.running_mean holds NaN or infinite"):
        certify(model, *images(2), LinfBall(0.1))


@pytest.mark.parametrize(
    "x, y, says",
    [
        (images(2)[0] * 255, images(2)[1], "pixel units"),
        ((images(2)[0] * 255).byte(), images(2)[1], "floating-point"),
        (images(2)[0] * math.nan, images(2)[1], "NaN"),
        (images(2)[0], torch.tensor([3, 10]), "from 0 to 9"),
        (images(2)[0], torch.tensor([3.0, 1.0]), "integer"),
        (images(2)[0], torch.tensor([3]), "2 inputs came with 1 labels"),
        (images(2)[0][..., :7], images(2)[1], r"does not take inputs of shape \(batch, 1, 8, 7\)"),
    ],
)
def test_bad_inputs(x, y, says):
    with pytest.raises(InputError, match=says):
        certify(tiny_mlp(), x, y, LinfBall(0.1))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"method": "guess"}, "cascade or among ibp, .*'guess'"),
        ({"method": ["ibp", "guess"]}, "'guess'"),
        ({"method": []}, "At least one method"),
        ({"batch_size": 0}, "batch size"),
        ({"attack_restarts": 0}, "1 restart"),
        ({"indices": [1]}, "2 different numbers.*1 came"),
        ({"indices": [1, 1]}, "1 of them different"),
    ],
)
def test_bad_options(options, says):
    x, _ = images(2)
    with pytest.raises(InputError, match=says):
        certify(tiny_mlp(), x, tiny_mlp()(x).argmax(1), LinfBall(0.1), **options)


def test_a_certifier_with_the_wrong_shape_is_an_error(monkeypatch):
    monkeypatch.setitem(METHODS, "ibp", lambda model, x, y, threat, *_: torch.zeros(len(x)))
    with pytest.raises(InputError, match=r"must give bounds of shape \(1, 3\)"):
        certify(MODEL, GREY, LABEL, LinfBall(0.1), "ibp")


def test_an_unsupported_layer_is_an_error_and_nothing_is_written(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)).eval()
    x, _ = images(2)
    with Ledger(tmp_path / "a.jsonl", {}) as ledger, pytest.raises(UnsupportedLayer):
        certify(model, x, model(x).argmax(1), LinfBall(0.1), ledger=ledger)
    assert read_ledger(tmp_path / "a.jsonl")[1] == []


@pytest.mark.parametrize(
    "change",
    [{"method": "attack"}, {"attack_steps": 6}, {"attack_restarts": 2}, {"input_seconds": 7.0}],
    ids=lambda change: next(iter(change)),
)
def test_a_ledger_of_other_settings_is_not_taken_verdicts_from(tmp_path, change):
    model, (x, _) = tiny_mlp(), images(3)
    y, asked = model(x).argmax(1), {"method": "ibp", "attack_steps": 5, "attack_restarts": 1, "input_seconds": 30.0}
    (key,) = change
    with Ledger(tmp_path / "a.jsonl", {"eps": 0.01, "norm": "linf", **asked}) as ledger:
        found = certify(model, x, y, LinfBall(0.01), ledger=ledger, **asked)
        assert certify(model, x, y, LinfBall(0.01), ledger=ledger, **asked) == found
        with pytest.raises(InputError, match=f"for {key} {asked[key]}, but {change[key]}"):
            certify(model, x, y, LinfBall(0.01), ledger=ledger, **{**asked, **change})


@pytest.mark.parametrize("written", ["cascade", ["cascade"], "ibp+crown-ibp+crown+alpha-crown", list(CASCADE)])
def test_a_header_may_write_the_methods_in_other_words(tmp_path, written):
    model, (x, _) = tiny_mlp(), images(2)
    y = model(x).argmax(1)
    with Ledger(tmp_path / "a.jsonl", {"eps": 0.01, "method": written}) as ledger:
        assert len(certify(model, x, y, LinfBall(0.01), ledger=ledger)) == 2
        with pytest.raises(InputError, match="for method .*, but ibp is"):
            certify(model, x, y, LinfBall(0.01), "ibp", ledger=ledger)


@pytest.mark.parametrize("header", [{}, {"data": "toy"}])
@pytest.mark.parametrize("ball", [LinfBall(0.02), L2Ball(0.01)])
def test_rows_answer_only_for_the_threat_they_were_made_for(tmp_path, header, ball):
    """A header that leaves it out does not make verdicts at one eps those at another."""
    model, (x, _) = tiny_mlp(), images(3)
    y = model(x).argmax(1)
    with Ledger(tmp_path / "a.jsonl", header) as ledger:
        found = certify(model, x, y, LinfBall(0.01), "ibp", ledger=ledger)
        assert certify(model, x, y, LinfBall(0.01), "ibp", ledger=ledger) == found
        with pytest.raises(InputError, match="row for input 0 that is for (eps 0.01|norm linf), but"):
            certify(model, x, y, ball, "ibp", ledger=ledger)
        assert len(ledger.verdicts) == 3


def test_autocast_is_refused():
    """Its bounds would be of fewer bits than what rounding is accounted for."""
    model, (x, _) = tiny_mlp(), images(2)
    y = model(x).argmax(1)
    asked = (
        lambda: certify(model, x, y, LinfBall(0.01)),
        lambda: certify_radii(model, x, y, largest=0.1, tolerance=0.01),
        lambda: decide(model, x[0], int(y[0]), LinfBall(0.01), seconds=1),
        lambda: SmoothedClassifier(model, CLASSES, 0.25).certify(x, n=100),
    )
    for ask in asked:
        ask()
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(InputError, match="Autocast is on for cpu"):
            ask()
