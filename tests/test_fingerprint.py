"""The content hash sees every constant that a module of one's own holds, and stays what it was for plain networks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from certifiers import certify
from certifiers.bounds import margin_lower_bounds
from certifiers.errors import InputError
from certifiers.fingerprint import model_hash
from certifiers.threat import LinfBall
from certifiers.verdict import Ledger


class Holds(nn.Module):
    def __init__(self, held) -> None:
        super().__init__()
        self.held = held


def by_hand() -> nn.Module:
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LeakyReLU(0.25), nn.Flatten(), nn.Linear(8, 3)
    model = nn.Sequential(*layers)
    for place, tensor in enumerate([*model.parameters(), model[1].running_mean, model[1].running_var]):
        tensor.data = (torch.arange(float(tensor.numel())) * 0.25 - place).view_as(tensor)
    return model


def test_hashes_of_plain_networks_are_what_they_were():
    """Or no ledger that was ever written could be gone on with."""
    assert model_hash(by_hand()) == "f45e2ef20b33e7f062739f8060eef8ca278c9d4765dd8dd4d10d729f687e775c"
    own = nn.Sequential(by_hand(), Holds(("a", 1, (2.5, None))))
    assert model_hash(own) == "8bde9930396a8706cdbc17b33b855e0dfded826309729d2c0c5ac88f6673a6b7"


def cyclic(value: float) -> list:
    held: list = [value]
    held.append({"again": held})
    return held


def tensors(value: float) -> list:
    return [torch.tensor([value]), torch.tensor([value, 0.0]), torch.tensor([[value]]), torch.tensor(value).double()]


HELD = {
    "tensor": tensors,
    "complex tensor": lambda v: [torch.tensor([1j * v]).conj(), torch.tensor([1j * v])],
    "sparse tensor": lambda v: [torch.eye(2).to_sparse() * v],
    "tensor that takes gradients": lambda v: [torch.tensor([v], requires_grad=True) * 2],
    "array": lambda v: [numpy.array([v]), numpy.array([v], dtype="float32"), numpy.array([[v]]), numpy.float32(v)],
    "list": lambda v: [[v], [v, v], [[v]], [(v,)], [str(v)]],
    "tuple": lambda v: [(torch.tensor(v),), ([v],), ({"std": v}, 1)],
    "dict": lambda v: [{"std": v}, {"mean": v}, OrderedDict(a=v, b=0), {"b": 0, "a": v}, {0: v}, {"0": v}, {(1, 2): v}],
    "set": lambda v: [{v}, {v, "a"}, {v, (v, "a")}, {v: None}],
    "nested": lambda v: [{"norm": {"std": [torch.tensor(v)]}}, [{"std": (v, [v])}]],
    "beside what is no constant": lambda v: [[v, nn.ReLU], {"act": len, "std": v}, ({"std": v}, object())],
    "cyclic": lambda v: [cyclic(v)],
}


@pytest.mark.parametrize("kind", HELD)
def test_hash_sees_constants_wherever_they_are(kind):
    held = [*HELD[kind](1.0), *HELD[kind](-0.5)]
    hashes = [model_hash(Holds(value)) for value in held]
    assert len(set(hashes)) == len(held)
    assert hashes == [model_hash(Holds(value)) for value in [*HELD[kind](1.0), *HELD[kind](-0.5)]]


def test_hash_leaves_out_what_holds_no_constant():
    """Addresses of objects are none, nor what torch.fx and bounds keep on a model."""
    whatever = [[], {}, {"f": len}, [nn.ReLU()], object(), set(), {1, 2}.__iter__(), [[[]]]]
    assert len({model_hash(Holds(value)) for value in whatever}) == 1
    deep: list = [1.0]
    for _ in range(5000):
        deep = [deep]
    for value in (deep, torch.empty(2, device="meta"), [torch.empty(2, device="meta")]):
        assert model_hash(Holds(value)) == model_hash(Holds(value))


def test_hash_of_a_set_does_not_depend_on_its_order():
    code = (
        "from tests.test_fingerprint import *; print(model_hash(Holds({str(n) for n in range(50)} | {(1, 'a'), None})))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        for seed in ("1", "2")
    ]
    assert len(found[0].stdout.strip()) == 64, found[0].stderr
    assert found[0].stdout == found[1].stdout


class Scaled(nn.Module):
    def __init__(self, held) -> None:
        super().__init__()
        self.held, self.head = held, nn.Linear(3, 2)

    def forward(self, x):
        scale = self.held["std"] if isinstance(self.held, dict) else self.held[0]
        return self.head(x) / scale


@pytest.mark.parametrize("held", [lambda v: [v], lambda v: {"std": v}, lambda v: torch.tensor([v])])
def test_a_ledger_does_not_answer_for_a_network_of_another_constant(tmp_path, held):
    model, x = Scaled(held(1.0)).eval(), torch.rand(3, 3)
    y = model(x).argmax(1)
    other = copy.deepcopy(model)
    other.held = held(0.5)  # of the same predictions
    with Ledger(tmp_path / "a.jsonl", {"model": model_hash(model)}) as ledger:
        certify(model, x, y, LinfBall(0.001), ledger=ledger)
        with pytest.raises(InputError, match="for model .*, but"):
            certify(other, x, y, LinfBall(0.001), ledger=ledger)


@pytest.mark.parametrize("held", [[2.0], [torch.tensor(2.0)]])
def test_tracing_leaves_the_hash_as_it_was(held):
    model = Scaled(held).eval()
    before = model_hash(model)
    margin_lower_bounds(model, torch.rand(2, 3), torch.tensor([0, 1]), LinfBall(0.1))
    margin_lower_bounds(model.double(), torch.rand(2, 3).double(), torch.tensor([0, 1]), LinfBall(0.1))
    assert model_hash(model.float()) == before == model_hash(copy.deepcopy(model))
