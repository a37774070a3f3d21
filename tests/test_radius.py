"""Radii: against the closed form on a linear model, against a dense grid of eps, resuming, shards."""

import json
import re

import pytest
import torch

from certifiers.bounds import margin_lower_bounds
from certifiers.certification import certify
from certifiers.errors import InputError, SoundnessError
from certifiers.fingerprint import model_hash
from certifiers.methods import METHODS
from certifiers.radius import RadiusLedger, RadiusVerdict, certify_radii, read_radius_ledger
from certifiers.threat import L2Ball, LinfBall
from certifiers.verdict import Status
from tests.linear_nets import dual_norm, inner_images, linear, margins
from tests.nets import CLASSES, NETS, images

BALLS = {"linf": LinfBall, "l2": L2Ball}


@pytest.mark.parametrize("norm, method", [("linf", "ibp"), ("linf", "crown"), ("l2", "crown"), ("l2", "alpha-crown")])
def test_the_closed_form_of_a_linear_model(norm, method):
    """The margin falls by eps times the dual norm of the rows' difference, as long as no pixel meets 0 or 1."""
    model, (x, _) = linear().double(), inner_images(12)
    x = x.double()
    y = model(x).argmax(1)
    true = (margins(model, x, y) / dual_norm(model, norm)).detach()
    tolerance = true.max().item() / 50
    rows = certify_radii(
        model, x, y, norm, method, largest=1.5 * true.max().item(), tolerance=tolerance, attack_steps=30
    )
    assert true.max() < (0.4 if norm == "linf" else 10)
    for row, radius in zip(rows, true.tolist(), strict=True):
        assert radius - tolerance * (1 + 1e-6) <= row.radius <= radius
        assert row.broken is not None and radius <= row.broken <= radius + 2.1 * tolerance
        assert row.status is (Status.certified if row.radius > 0 else Status.unknown)


@pytest.mark.parametrize("norm", BALLS)
def test_a_dense_grid_of_eps(norm):
    model, (x, _) = NETS["mlp"](), images(10)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % CLASSES
    methods, largest = ["ibp", "crown"], 0.12 if norm == "linf" else 1.0
    tolerance = largest / 60
    rows = certify_radii(model, x, y, norm, methods, largest=largest, tolerance=tolerance)
    grid = torch.linspace(0, largest, 61)[1:]

    def certified(eps, method):
        return (margin_lower_bounds(model, x, y, BALLS[norm](eps), method).scatter(1, y[:, None], 1) > 0).all(1)

    proven = torch.stack([certified(eps, "ibp") | certified(eps, "crown") for eps in grid.tolist()])
    assert rows[0].status is Status.misclassified and rows[0].radius == 0.0
    radii = [row.radius for row in rows[1:]]
    assert len(set(radii)) > 5 and sum(row.method == "crown" for row in rows) > 0
    for row, held in zip(rows[1:], proven.T[1:], strict=True):
        best = grid[held].max().item() if held.any() else 0.0
        assert abs(row.radius - best) <= tolerance + largest / 60 + 1e-6
        # The radius is an eps that certifies by itself, whatever happened on the way to it.
        ball = BALLS[norm](row.radius)
        i = row.index
        assert certify(model, x[i : i + 1], y[i : i + 1], ball, methods)[0].status is Status.certified
        assert row.broken is None or row.broken > row.radius


def test_certificates_that_are_not_monotone_are_reported_as_certified(monkeypatch):
    """Certified only in a band of eps: the radius must lie in the band or be 0, never merely below it."""
    asked = []

    def band(model, x, y, threat, *_):
        eps = threat.eps.flatten()
        good = (eps > 0.02) & (eps < 0.03)
        asked.extend(eps[good].tolist())
        return torch.where(good[:, None], 1e-4, -1.0).expand(len(x), CLASSES)

    monkeypatch.setitem(METHODS, "ibp", band)
    model, (x, _) = NETS["mlp"](), images(6)
    y = model(x).argmax(1)
    rows = certify_radii(model, x, y, method="ibp", largest=0.1, tolerance=0.001, attack_steps=0)
    assert asked and all(row.radius in asked or row.radius == 0.0 for row in rows)


def test_a_certifier_that_lies_is_found_out_by_the_attack_at_the_radius(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "ibp", lambda model, x, *_: torch.full((len(x), CLASSES), 1e-3))
    model, (x, _) = NETS["mlp"](), images(6)
    y = model(x).argmax(1)
    with RadiusLedger(tmp_path / "r.jsonl", {"norm": "linf"}) as ledger, pytest.raises(SoundnessError, match="unsound"):
        certify_radii(model, x, y, method="ibp", largest=0.5, tolerance=1e-3, ledger=ledger)
    with pytest.raises(SoundnessError, match="contradicted"):
        read_radius_ledger(tmp_path / "r.jsonl")


def bare(rows):
    return sorted((r.index, r.status.value, r.radius, r.broken, r.method) for r in rows)


def test_resuming_and_shards_give_what_one_run_gives(tmp_path):
    model, (x, _) = NETS["mlp"](), images(12)
    y = model(x).argmax(1)
    settings = {"largest": 0.05, "tolerance": 0.001, "batch_size": 5, "attack_steps": 5}
    whole = certify_radii(model, x, y, **settings)
    path, header = tmp_path / "r.jsonl", {"model": model_hash(model), "norm": "linf", "largest": 0.05}

    def stop(done, _):
        raise KeyboardInterrupt

    with RadiusLedger(path, header) as ledger, pytest.raises(KeyboardInterrupt):
        certify_radii(model, x, y, ledger=ledger, on_batch=stop, **settings)
    path.write_bytes(path.read_bytes()[:-10])
    with RadiusLedger(path, header) as ledger:
        assert len(ledger.verdicts) == 4
        certify_radii(model, x, y, ledger=ledger, **settings)
    assert bare(read_radius_ledger(path)[1]) == bare(whole)
    shards = [certify_radii(model, x[a:b], y[a:b], indices=range(a, b), **settings) for a, b in ((0, 7), (7, 12))]
    assert bare(shards[0] + shards[1]) == bare(whole)
    with RadiusLedger(path, header) as ledger, pytest.raises(InputError, match="for largest 0.05"):
        certify_radii(model, x, y, ledger=ledger, **{**settings, "largest": 0.06})
    asked = {"method": "ibp+crown-ibp+crown", "attack_steps": 5, "attack_restarts": 1}
    with RadiusLedger(tmp_path / "s.jsonl", {**header, **asked}) as ledger:
        certify_radii(model, x, y, ledger=ledger, **settings)
        for change in ({"method": "ibp"}, {"attack_steps": 6}, {"attack_restarts": 2}):
            (key,) = change
            with pytest.raises(InputError, match=f"for {key} {re.escape(str(asked[key]))}, but"):
                certify_radii(model, x, y, ledger=ledger, **{**settings, **change})
    with pytest.raises(InputError, match="another largest"):
        RadiusLedger(path, {**header, "largest": 0.06})


@pytest.mark.parametrize(
    "change, says",
    [
        ({"radius": 0.2}, "radius 0.2"),
        ({"radius": 0.0}, "certified with"),
        ({"prediction": 1}, "certified with prediction 1, label 0"),
        ({"status": "misclassified", "prediction": 1}, "misclassified"),
        ({"broken": 0.03}, "known within 0.03"),
    ],
)
def test_rows_that_cannot_be_true_are_not_read(tmp_path, change, says):
    path, header = tmp_path / "r.jsonl", {"norm": "linf", "largest": 0.1}
    row = RadiusVerdict(0, 0, 0, Status.certified, 0.05, 0.06, "ibp", 0.1)
    with RadiusLedger(path, header) as ledger:
        ledger.append([row])
    with path.open("a") as file:
        file.write(json.dumps({**vars(row), "index": 1, **change}) + "\n")
    with pytest.raises(InputError, match=f"Line 3 .*cannot be true.*{says}"):
        read_radius_ledger(path)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tolerance": 0.0}, "tolerance one above 0"),
        ({"largest": float("inf")}, "finite"),
        ({"method": "lirpa-crown"}, "not by 'lirpa-crown'"),
        ({"norm": "l1"}, "one of linf, l2"),
        ({"run_seconds": 0.0}, "run_seconds"),
        ({"batch_size": 0}, "batch size"),
    ],
)
def test_bad_settings(change, says):
    x, y = images(2)
    with pytest.raises(InputError, match=says):
        certify_radii(NETS["mlp"](), x, y, **{"largest": 0.1, "tolerance": 0.01, **change})


def test_the_runs_time_ends_between_batches():
    x, y = images(4)
    rows = certify_radii(NETS["mlp"](), x, y, largest=0.1, tolerance=0.01, batch_size=1, run_seconds=1e-9)
    assert rows == []


def test_rows_without_a_norm_are_not_taken_for_another(tmp_path):
    model, (x, _) = NETS["mlp"](), images(2)
    y = model(x).argmax(1)
    with RadiusLedger(tmp_path / "r.jsonl", {"data": "toy"}) as ledger:
        certify_radii(model, x, y, "l2", largest=0.1, tolerance=0.01, ledger=ledger)
        with pytest.raises(InputError, match="does not say for which norm, but norm linf"):
            certify_radii(model, x, y, "linf", largest=0.1, tolerance=0.01, ledger=ledger)


def test_no_radius_where_the_last_attack_comes_upon_a_tie():
    """Logits of 8000, whose last digits are coarser than the bounds': rounded, the network ties within the radius."""
    tied = 0
    for seed in range(600):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(1, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.rand(2, 1))
            layer.bias.copy_(torch.tensor([8000.0, 8000.0]))
            layer.bias[0] += 0.01 * torch.rand(1)[0]
        model, x = torch.nn.Sequential(layer).eval(), torch.full((1, 1), 0.5)
        y = torch.zeros(1, dtype=torch.long)
        if model(x).argmax() != 0:
            continue
        (row,) = certify_radii(model, x, y, method="crown", largest=0.5, tolerance=1e-3)
        tied += row.radius == 0 and row.broken is not None
        if row.radius > 0:
            (verdict,) = certify(model, x, y, LinfBall(row.radius), "crown")
            assert verdict.status is Status.certified
    assert tied > 0
