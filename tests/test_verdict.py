import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from certifiers import journal
from certifiers.errors import InputError, SoundnessError
from certifiers.verdict import Accuracy, Ledger, Status, Verdict, model_hash, read_ledger, summarise
from tests.nets import tiny_bn, tiny_mlp

HEADER = {"model": "abc", "data": "digits", "split": "test", "eps": 0.1, "norm": "linf", "method": ["ibp"]}


def verdict(index: int, status: Status = Status.certified, **changes) -> Verdict:
    prediction = 4 if status is Status.misclassified else 3
    values = {"label": 3, "prediction": prediction, "eps": 0.1, "norm": "linf", "method": "ibp"}
    return Verdict(index=index, status=status, **{**values, "margin": 0.25, "seconds": 0.5, **changes})


def written(path: Path, n: int) -> list[Verdict]:
    verdicts = [verdict(index) for index in range(n)]
    with Ledger(path, HEADER) as ledger:
        ledger.append(verdicts)
    return verdicts


# ---- the ledger


def test_verdicts_come_back_as_they_went_in(tmp_path):
    path = tmp_path / "folder" / "a.jsonl"
    verdicts = [
        verdict(7, margin=1 / 3, seconds=1e-300),
        verdict(2, Status.misclassified, margin=None, method="clean"),
        verdict(5, Status.unknown, margin=-math.pi * 1e10),
    ]
    with Ledger(path, {**HEADER, "note": "x"}) as ledger:
        ledger.append(verdicts[:1])
        ledger.append(verdicts[1:])
        assert ledger.verdicts == verdicts and ledger.decided == {2, 5, 7}
    assert read_ledger(path) == ({"ledger": 1, **HEADER, "note": "x"}, verdicts)
    assert all(isinstance(v.status, Status) for v in read_ledger(path)[1])
    with Ledger(path, HEADER) as again:
        assert again.verdicts == verdicts
        again.append([verdict(0)])
    assert [v.index for v in read_ledger(path)[1]] == [7, 2, 5, 0]


def test_each_line_is_plain_json(tmp_path):
    written(tmp_path / "a.jsonl", 1)
    header, row = (json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert header["ledger"] == 1 and header["model"] == "abc"
    assert row == {
        "index": 0, "label": 3, "prediction": 3, "status": "certified", "eps": 0.1, "norm": "linf",
        "method": "ibp", "margin": 0.25, "seconds": 0.5, "stages": {},
    }  # fmt: skip


def test_a_batch_is_on_the_disk_when_append_returns(tmp_path):
    with Ledger(tmp_path / "a.jsonl", HEADER) as ledger:
        for index in range(3):
            ledger.append([verdict(index)])
            assert len(read_ledger(tmp_path / "a.jsonl")[1]) == index + 1


def test_cut_at_every_byte_of_the_last_two_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    verdicts = written(path, 4)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for length in range(ends[2], len(content) + 1):
        path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends) - 1
        assert read_ledger(path)[1] == verdicts[:whole]
        assert path.read_bytes() == content[:length]  # reading changes nothing
        with Ledger(path, HEADER) as ledger:
            assert ledger.verdicts == verdicts[:whole]
            assert path.read_bytes() == content[: ends[whole]]  # the cut line is gone
            ledger.append([v for v in verdicts if v.index not in ledger.decided])
        assert path.read_bytes() == content


def test_killed_while_writing(tmp_path):
    """Eight processes in a row, each killed at a random moment: no line lost that was synced, none doubled."""
    path, acknowledged = tmp_path / "a.jsonl", tmp_path / "acknowledged"
    script = tmp_path / "writer.py"
    script.write_text(
        "import os, sys, types\n"
        # The journal alone: importing torch eight times would take most of the time.
        "package = types.ModuleType('certifiers'); package.__path__ = [sys.argv[3]]\n"
        "sys.modules['certifiers'] = package\n"
        "from pathlib import Path\n"
        "from certifiers import journal\n"
        "path = Path(sys.argv[1])\n"
        "if not path.exists(): journal.create(path, {'ledger': 1})\n"
        "writer = journal.Appender(path)\n"
        "rows, end = journal.read(path)\n"
        "writer.cut(end)\n"
        "n = len(rows) - 1\n"
        "log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "while True:\n"
        "    writer.append([{'index': n + i, 'padding': 'x' * 5000} for i in range(7)])\n"
        "    n += 7\n"
        "    os.write(log, f'{n}\\n'.encode())\n"
    )
    moments, before = random.Random(0), 0
    for _ in range(8):
        arguments = [sys.executable, str(script), str(path), str(acknowledged), str(Path(journal.__file__).parent)]
        process = subprocess.Popen(arguments)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and _last(acknowledged) <= before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows, _ = journal.read(path)
        assert [row["index"] for row in rows[1:]] == list(range(len(rows) - 1))
        assert len(rows) - 1 >= _last(acknowledged) > before
        before = len(rows) - 1


def _last(path: Path) -> int:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(lines[-1]) if lines else 0


@pytest.mark.parametrize("key", ["model", "data", "split", "eps", "norm", "method", "external", "timeout"])
def test_a_ledger_of_another_experiment_is_refused(tmp_path, key):
    path = tmp_path / "a.jsonl"
    written(path, 2)
    content = path.read_bytes() + b'{"index": 2, "la'  # not even the cut line may be dropped
    path.write_bytes(content)
    other = {**HEADER, key: 0.2 if key == "eps" else "another"}
    with pytest.raises(InputError, match=f"another {key}") as caught:
        Ledger(path, other)
    assert str(HEADER.get(key)) in str(caught.value) and str(other[key]) in str(caught.value)
    assert path.read_bytes() == content


def test_notes_in_the_header_may_differ(tmp_path):
    with Ledger(tmp_path / "a.jsonl", {**HEADER, "started": "yesterday"}):
        pass
    with Ledger(tmp_path / "a.jsonl", {**HEADER, "method": ("ibp",), "started": "today"}) as ledger:
        assert ledger.header["started"] == "yesterday"  # the file says what it is about


def test_no_index_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    written(path, 2)
    content = path.read_bytes()
    with Ledger(path, HEADER) as ledger:
        for batch in ([verdict(5), verdict(1)], [verdict(5), verdict(5)]):
            with pytest.raises(InputError, match="has a verdict already"):
                ledger.append(batch)
            assert path.read_bytes() == content and ledger.decided == {0, 1}


def test_verdicts_for_another_threat_set_are_refused(tmp_path):
    with Ledger(tmp_path / "a.jsonl", HEADER) as ledger:
        for change in ({"eps": 0.2}, {"norm": "l2"}):
            with pytest.raises(InputError, match="its own ledger"):
                ledger.append([verdict(0), verdict(1, **change)])
        assert ledger.verdicts == []
    assert read_ledger(tmp_path / "a.jsonl")[1] == []


@pytest.mark.parametrize(
    "change, says",
    [
        ({"eps": 0.01}, "for eps 0.1, but the row for 0.01"),
        ({"norm": "l2"}, "for norm linf, but the row for l2"),
        ({"label": 2}, "certified with prediction 3 and label 2"),
        ({"label": 2, "status": "falsified"}, "falsified with prediction 3 and label 2"),
        ({"status": "misclassified"}, "misclassified with prediction 3 and label 3"),
        ({"margin": -5.0}, "certified with a margin of -5.0"),
        ({"margin": 0.0}, "certified with a margin of 0.0"),
        ({"margin": math.nan}, "certified with a margin of nan"),
    ],
)
def test_rows_that_cannot_be_true_are_neither_read_nor_written(tmp_path, change, says):
    """Edited by hand, say, or of another ledger: two files put together by cat."""
    path = tmp_path / "a.jsonl"
    written(path, 1)
    row = {**vars(verdict(1)), **change}
    with Ledger(path, HEADER) as ledger, pytest.raises(InputError, match=f"input 1 cannot go .*{says}"):
        ledger.append([Verdict(**{**row, "status": Status(row["status"])})])
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    content = path.read_bytes()
    for use in (lambda: read_ledger(path), lambda: Ledger(path, HEADER)):
        with pytest.raises(InputError, match=f"Line 3 .*cannot be true: .*{says}"):
            use()
    assert path.read_bytes() == content


def test_only_an_undecided_verdict_gives_way_to_another(tmp_path):
    path, done = tmp_path / "a.jsonl", Status.certified
    rows = [verdict(0), verdict(1, Status.unknown, margin=-1.0), verdict(2, Status.timeout, margin=None)]
    with Ledger(path, HEADER) as ledger:
        ledger.append(rows)
        content = path.read_bytes()
        for bad in (verdict(0), verdict(5), verdict(1, eps=0.2), verdict(1, margin=-1.0)):
            with pytest.raises(InputError, match="no undecided verdict for input|cannot go"):
                ledger.settle(bad)
        assert path.read_bytes() == content
        ledger.settle(verdict(1, done))
        assert read_ledger(path)[1] == ledger.verdicts == [rows[0], verdict(1, done), rows[2]]
        with pytest.raises(InputError, match="another process"):
            Ledger(path, HEADER)  # the lock goes over to the new file
        ledger.append([verdict(3)])
        ledger.settle(verdict(2, Status.falsified, margin=None))
    assert [row.status.value for row in read_ledger(path)[1]] == ["certified", "certified", "falsified", "certified"]
    with Ledger(path, HEADER) as ledger:
        assert ledger.decided == {0, 1, 2, 3}
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_row_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    with Ledger(tmp_path / "a.jsonl", HEADER) as ledger:
        ledger.append([verdict(0, Status.unknown, margin=None)])
        content = ledger.path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _full_disk)
            with pytest.raises(OSError, match="full"):
                ledger.settle(verdict(0))
        assert ledger.path.read_bytes() == content and ledger.verdicts[0].status is Status.unknown
        ledger.settle(verdict(0))
    assert read_ledger(tmp_path / "a.jsonl")[1] == [verdict(0)]


def _replace_line(number: int, line: bytes):
    def damage(content: bytes) -> bytes:
        lines = content.split(b"\n")
        lines[number - 1] = line
        return b"\n".join(lines)

    return damage


@pytest.mark.parametrize(
    "damage, says",
    [
        (_replace_line(3, b'{"index": 1, "lab'), "Line 3 .*damaged"),
        (_replace_line(3, b""), "Line 3 .*damaged"),
        (_replace_line(3, b"\x00\xff"), "Line 3 .*damaged"),
        (_replace_line(3, b"[1]"), "Line 3 .*damaged"),
        (_replace_line(5, b'{"index": 3}'), "Line 5 .*no verdict.*label"),
        (lambda content: content.replace(b"certified", b"sertified", 1), "Line 2 .*no verdict.*sertified"),
        (lambda content: content + content.split(b"\n")[2] + b"\n", "Line 6 .*second verdict"),
        (_replace_line(1, b'{"ledger": 1,'), "Line 1 .*damaged"),
        (_replace_line(1, b'{"ledger": 99}'), "no ledger"),
        (_replace_line(1, b'{"a": 1}'), "no ledger"),
        (lambda content: content[:10], "header, is incomplete"),
        (lambda content: b"", "header, is incomplete"),
    ],
)
def test_damaged_files_are_errors_and_stay_as_they_are(tmp_path, damage, says):
    path = tmp_path / "a.jsonl"
    written(path, 4)
    content = damage(path.read_bytes())
    path.write_bytes(content)
    for use in (lambda: read_ledger(path), lambda: Ledger(path, HEADER)):
        with pytest.raises(InputError, match=says):
            use()
        assert path.read_bytes() == content


def test_missing_file_and_folder_in_its_place(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_ledger(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be opened"):
        Ledger(tmp_path, HEADER)


def test_one_writer_at_a_time(tmp_path):
    with Ledger(tmp_path / "a.jsonl", HEADER), pytest.raises(InputError, match="another process"):
        Ledger(tmp_path / "a.jsonl", HEADER)
    Ledger(tmp_path / "a.jsonl", HEADER).close()  # free again


def test_a_file_that_vanishes_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    with Ledger(path, HEADER) as ledger:
        path.rename(tmp_path / "b.jsonl")
        with pytest.raises(InputError, match="removed or replaced"):
            ledger.append([verdict(0)])
        journal.create(path, {"ledger": 1})
        with pytest.raises(InputError, match="removed or replaced"):
            ledger.append([verdict(0)])
        assert ledger.decided == set()


def test_a_write_that_fails_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    written(path, 1)
    content = path.read_bytes()
    with Ledger(path, HEADER) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _full_disk)
            with pytest.raises(OSError, match="full"):
                ledger.append([verdict(1)])
        assert path.read_bytes() == content and ledger.decided == {0}
        ledger.append([verdict(1)])
    assert [v.index for v in read_ledger(path)[1]] == [0, 1]


def _full_disk(_descriptor: int) -> None:
    raise OSError("disk full")


def test_the_header_appears_wholly_or_not_at_all(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full_disk)
        with pytest.raises(OSError, match="full"):
            Ledger(tmp_path / "a.jsonl", HEADER)
    assert not (tmp_path / "a.jsonl").exists()
    with Ledger(tmp_path / "a.jsonl", HEADER):
        pass
    assert os.listdir(tmp_path) == ["a.jsonl"]  # the temporary file is gone


def test_a_contradiction_closes_the_ledger_for_good(tmp_path):
    path = tmp_path / "a.jsonl"
    with Ledger(path, HEADER) as ledger:
        ledger.append([verdict(0)])
        ledger.record_contradiction({"index": 1, "method": "wrong"})
    for use in (lambda: read_ledger(path), lambda: Ledger(path, HEADER)):
        with pytest.raises(SoundnessError, match="'method': 'wrong'"):
            use()


# ---- the content hash


def test_equal_models_have_equal_hashes():
    model = tiny_bn()
    assert model_hash(model) == model_hash(tiny_bn())
    assert model_hash(model) == model_hash(copy.deepcopy(model).train().requires_grad_(False))
    assert len(model_hash(model)) == 64


def test_hash_is_the_same_in_another_process():
    code = "from certifiers.verdict import model_hash; from tests.nets import tiny_bn; print(model_hash(tiny_bn()))"
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == model_hash(tiny_bn()), found.stderr


def test_hash_ignores_addresses_of_functions():
    class WithFunction(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def extra_repr(self) -> str:
            return f"{object.__repr__(self.function)}"

    assert model_hash(WithFunction(lambda: 1)) == model_hash(WithFunction(lambda: 1))


def _flip_a_bit(model: nn.Module) -> nn.Module:
    model[1].weight.data.view(torch.int32)[3, 5] ^= 1
    return model


def _swap_two(model: nn.Module) -> nn.Module:
    weight = model[1].weight.data
    weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    return model


def _other_slope(model: nn.Module) -> nn.Module:
    model[2] = nn.LeakyReLU(0.1)
    return model


def _hidden_buffer(model: nn.Module) -> nn.Module:
    model[0].register_buffer("mean", torch.zeros(1), persistent=False)
    return model


@pytest.mark.parametrize("change", [_flip_a_bit, _swap_two, _other_slope, _hidden_buffer, nn.Module.double])
def test_any_change_changes_the_hash(change):
    assert model_hash(change(tiny_mlp())) != model_hash(tiny_mlp())


def test_hash_sees_names_and_values_of_hidden_buffers():
    def model(name: str, value: float) -> nn.Module:
        module = nn.Flatten()
        module.register_buffer(name, torch.tensor(value), persistent=False)
        return module

    assert len({model_hash(model(name, value)) for name in ("a", "b") for value in (1.0, 2.0)}) == 4


# ---- accuracies


def test_summary_by_hand():
    statuses = [Status.certified] * 3 + [Status.falsified] * 2 + [Status.unknown, Status.timeout]
    verdicts = [verdict(i, status) for i, status in enumerate(statuses)]
    verdicts += [verdict(7, Status.misclassified), verdict(8, Status.misclassified)]
    verdicts += [verdict(9, Status.abstained)]
    summary = summarise(verdicts)
    assert summary.n == 10
    assert (summary.clean.count, summary.certified.count, summary.attack.count) == (7, 3, 5)
    assert (summary.clean.value, summary.certified.value, summary.attack.value) == (0.7, 0.3, 0.5)
    said = "10 images, clean 70.0 % [39.7, 89.2], attack 50.0 % [23.7, 76.3], certified 30.0 % [10.8, 60.3]"
    assert str(summary) == said


def test_only_right_predictions_count_as_certified():
    assert summarise([verdict(0, prediction=8)]).certified.count == 0


@pytest.mark.parametrize("count, n", [(0, 10), (3, 10), (10, 10), (973, 1000)])
def test_wilson_interval_by_its_formula(count, n):
    z, p = 1.959963984540054, count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    accuracy = Accuracy(count, n)
    assert accuracy.low == pytest.approx(max(centre - half, 0.0), abs=1e-12)
    assert accuracy.high == pytest.approx(min(centre + half, 1.0), abs=1e-12)
    assert 0.0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1.0


def test_no_verdicts_no_accuracy():
    with pytest.raises(InputError, match="at least one verdict"):
        summarise([])


def test_hash_sees_numbers_that_only_a_module_of_ones_own_holds():
    class Signed(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

    assert len({model_hash(Signed(sign)) for sign in (1.0, -1.0, (1, 2), (2, 1), None)}) == 5


def test_hash_sees_how_a_compacted_network_is_wired():
    from certprune.compact.layers import build

    one = {"kind": "linear", "in_features": 1, "out_features": 2, "bias": False, "inputs": [0]}
    tensors = {f"layers.linear{i}.weight": torch.tensor([[float(i)], [0.0]]) for i in (1, 2)}
    nets = [
        build([one, one, {"kind": "difference", "inputs": way}], tensors, torch.float32) for way in ([1, 2], [2, 1])
    ]
    x = torch.ones(1, 1)
    assert not torch.equal(nets[0](x), nets[1](x)) and model_hash(nets[0]) != model_hash(nets[1])
