"""The command line: what each command prints, and that every mistake is one paragraph that spoils nothing."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import certprune
from certifiers.errors import InputError
from certprune import runs
from certprune.cli import main
from certprune.cli.app import ORDER
from certprune.progress import make_progress
from tests.commands import ONE_EPOCH, ROOT, SMOKE, VARIANTS, smoke_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the smoke recipe, cut down; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished") / "smoke"
    return smoke_run(folder, *ONE_EPOCH, "certify.count=10")


def contents(folder):
    """Every file but the log of commands and the lock."""
    skipped = {"provenance.json", ".lock"}
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in skipped
    }


# --- commands that work ------------------------------------------------------------------------------------------


def test_the_list_of_commands_is_in_the_order_of_work_with_no_line_cut_off(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli("--help") == 0
    listed = cli.out.split("Commands:\n")[1]
    assert tuple(line.split()[0] for line in listed.strip().splitlines()) == ORDER
    assert "..." not in listed


def test_help_needs_no_torch():
    code = "import sys; from certprune.cli import main; sys.argv[1:] = ['--help']\ntry: main()\nfinally: " \
        "print('torch' in sys.modules)"  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip().endswith("False"), shown.stdout
    for command in ("run", "demo", "certify", "curve", "report", "datasets", "models", "doctor"):
        assert re.search(rf"^\W*{command}\b", shown.stdout, re.M)


def test_version(cli):
    assert cli("--version") == 0 and cli.out == f"certprune {certprune.__version__}\n"


def test_lists(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli("datasets") == 0 and "mnist-5k" in cli.out and "fashion-mnist" in cli.out
    assert cli("models") == 0 and "cnn_small" in cli.out
    assert cli("doctor") == 0
    for word in ("torch", "auto_LiRPA", "cores", "cuda", "data: digits"):
        assert word in cli.out


def test_a_finished_run_does_nothing_but_report(cli, work):
    page = work / "report.html"  # shows the log of commands, which grows
    before = {**contents(work), page.relative_to(work): None}
    assert cli("run", work) == 0
    assert "epoch" not in cli.out and str(page) in cli.out
    assert {**contents(work), page.relative_to(work): None} == before
    log = json.loads((work / "provenance.json").read_text())
    assert len(log["resumed"]) == 1 and set(log["stages"]) == {
        "pretrain", *(f"{name}/{stage}" for name in VARIANTS for stage in ("prune", "finetune"))
    }  # fmt: skip


def test_one_stage_alone(cli, tmp_path):
    settings = ("pretrain.epochs=1", "output=r")
    cli.refuses("run", SMOKE, *settings, "--stage", "certify", saying=["r", "config.yaml"])
    assert not (tmp_path / "r").exists()
    assert cli("run", SMOKE, *settings, "--stage", "pretrain") == 0
    assert [path.name for path in (tmp_path / "r").iterdir() if path.is_dir()] == ["pretrain"]
    cli.refuses("run", SMOKE, *settings, "--stage", "finetune", saying=["prune", "not complete", "certprune run r"])
    cli.refuses("run", SMOKE, *settings, "--stage", "finish", saying=["finish", "certify"])


def test_more_images_and_other_methods_can_be_certified_later(cli, work):
    ledger = work / "certificates" / VARIANTS[0] / "eps-0.02.jsonl"
    before = ledger.read_text()
    assert cli("certify", work, "--eps", "0.02", "--variant", VARIANTS[0], "--index", "5:15") == 0
    rows = [json.loads(line) for line in ledger.read_text().splitlines()[1:]]
    assert ledger.read_text().startswith(before) and sorted(row["index"] for row in rows) == list(range(15))
    assert "15 images" in cli.out and "certified" in cli.out
    after = ledger.read_text()
    assert cli("certify", work, "--method", "crown", "--eps", "2/255", "--variant", "pretrain", "--count", "5") == 0
    (other,) = (work / "certificates" / "pretrain").iterdir()
    header, *rows = map(json.loads, other.read_text().splitlines())
    assert header["eps"] == 2 / 255 and header["variant"] == "pretrain" and len(rows) == 5
    assert ledger.read_text() == after


def test_a_curve_of_ledgers(cli, work, tmp_path):
    ledgers = sorted((work / "certificates").glob("*/*.jsonl"))
    assert cli("curve", *ledgers, "-o", tmp_path / "c.png") == 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "c.csv").stat().st_size


def test_settings_for_certifying_may_change(cli, work):
    assert cli("run", work, "certify.count=12") == 0
    assert "12 digits test images" in cli.out
    assert "count: 12" in (work / "config.yaml").read_text()


def test_a_terminal_sees_a_bar_with_rate_and_accuracy():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = make_progress(console)
    progress.begin("pretrain", 200)
    for number in (1, 2):
        progress.advance(100, "loss 1.5")
        row = {"validation": {"loss": 0.75, "certified_accuracy": 0.5}}
        progress.epoch(number, 2, row)
    progress.advance(0, "loss 1.5")
    progress.bars.refresh()
    progress.end("epoch 2 selected")
    progress.close()
    shown = console.file.getvalue()
    for words in ("images/s", "epoch 2/2 · loss 1.5", "certified 50.0 %", "pretrain", "100%", "epoch 2 selected"):
        assert words in shown


def test_a_dense_yardstick_and_an_objective_without_eps(cli, tmp_path):
    recipe = tmp_path / "benign.yaml"
    recipe.write_text(
        f"extends: {SMOKE}\nname: benign\nmodel: {{batch_norm: true}}\nobjective: {{name: benign}}\n"
        "initialisation: default\npretrain: {epochs: 2}\nprune: {epochs: 1}\nfinetune: {epochs: 2}\n"
        "variants: [{dense: true}, {sparsity: 0.5, name: half}]\ncertify: {eps: null}\n"
    )
    assert cli("run", recipe) == 0
    run = runs.open_run(tmp_path / "runs" / "benign")
    assert run.stage_record("finetune", "dense")["epochs"] == 3 and not run.is_complete("prune", "dense")
    assert run.stage_record("finetune", "dense")["sparsity"]["total"] == 0
    assert run.stage_record("finetune", "half")["sparsity"]["total"] == pytest.approx(0.5, abs=0.01)
    assert not (run.folder / "certificates").exists() and (run.folder / "report.html").exists()
    before, after = (run.load_model(*where).state_dict() for where in (("pretrain",), ("half", "prune")))
    statistics = [name for name in before if "running" in name]
    assert statistics and all(before[name].equal(after[name]) for name in statistics)


# --- loading -----------------------------------------------------------------------------------------------------


def test_networks_are_loaded_from_a_run(finished):
    by_variant = runs.load(finished / VARIANTS[0])
    by_stage = runs.load(finished / VARIANTS[0] / "finetune")
    by_file = runs.load(finished / VARIANTS[0] / "finetune" / "model.safetensors")
    before = runs.load(finished / VARIANTS[0] / "prune")
    x = torch.rand(3, 1, 8, 8)
    assert not by_variant.training
    assert torch.equal(by_variant(x), by_stage(x)) and torch.equal(by_variant(x), by_file(x))
    assert not torch.equal(by_variant(x), before(x))
    masks = runs.open_run(finished).load_masks(VARIANTS[0])
    weights = dict(by_variant.named_parameters())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == round(0.2 * sum(mask.numel() for mask in masks.values()))
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())


@pytest.mark.parametrize("path", ["", "score-erk-0.9", "certificates", "../elsewhere", "pretrain/prune"])
def test_what_is_no_network_is_not_loaded(finished, path):
    with pytest.raises(InputError):
        runs.load(finished / path)


# --- mistakes: one paragraph, nothing written over ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "saying"),
    [
        ("pretrain.epoch=2", ["pretrain.epoch ", "epochs"]),
        ("pretrain.epochs=many", ["pretrain.epochs", "whole number", "many"]),
        ("objective.eps=-0.1", ["eps", "-0.1"]),
        ("variants.0.sparsity=1.2", ["variants.0.sparsity", "1.2"]),
        ("data.name=cifar-11", ["cifar-11", "digits"]),
        ("data.sise=3", ["sise"]),
        ("data={name: folder, root: nowhere}", ["nowhere"]),
        ("data={name: mnist, root: nowhere, download: false}", ["nowhere"]),
        ("model.name=mpl", ["mpl", "mlp"]),
        ("model.depth=3", ["depth", "hidden"]),
        ("prune.layers=[conv*]", ["conv*"]),
        ("data={name: function, function: 'mine:labels'}", ["label"]),
        ("data={name: function, function: 'mine:bright'}", ["[0, 1]"]),
        ("model={name: 'mine:odd'}", ["GELU"]),
        ("device=cuda", ["cuda"]),
    ],
)
def test_a_wrong_recipe_starts_nothing(cli, tmp_path, setting, saying):
    if setting == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def images(n): return torch.rand(n, 1, 8, 8)\n"
        "def data(x, y): return (x, y), (x, y)\n"
        "def labels(): return data(images(40), torch.arange(40) % 4 - 1)\n"
        "def bright(): return data(images(40) * 255, torch.arange(40) % 4)\n"
        "def odd(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.GELU(), "
        "nn.Linear(9, classes))\n"
    )
    sys.modules.pop("mine", None)
    cli.refuses("run", SMOKE, setting, "output=r", saying=saying)
    assert not (tmp_path / "r").exists()


def test_recipes_that_are_none(cli, tmp_path):
    cli.refuses("run", "nowhere.yaml", saying=["nowhere.yaml"])
    (tmp_path / "bad.yaml").write_text("name: [")
    cli.refuses("run", "bad.yaml", saying=["bad.yaml", "YAML"])
    cli.refuses("run", tmp_path, saying=["config.yaml"])
    cli.refuses("certify", tmp_path, saying=["not a run folder"])


def test_another_recipe_does_not_touch_a_run(cli, work):
    before, log = contents(work), (work / "provenance.json").read_bytes()
    cli.refuses("run", work, "seed=7", "pretrain.epochs=9", saying=["seed: 0 -> 7", "pretrain.epochs", "output="])
    assert contents(work) == before and (work / "provenance.json").read_bytes() == log


def test_a_folder_with_other_things_is_not_used(cli, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("years")
    cli.refuses("run", SMOKE, "output=r", saying=["not a run folder", "output="])
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["thesis.txt"]
    cli.refuses("run", SMOKE, "output=r/thesis.txt", saying=["is a file"])
    cli.refuses("run", SMOKE, "output=r/thesis.txt/deeper", saying=["thesis.txt", "Check the path"])


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _nan(path):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path)


def _foreign(path):
    save_file({"something": torch.zeros(3)}, path)


def _no_weights(path):
    path.write_text("weights, honestly")


def _gone(path):
    path.unlink()


@pytest.mark.parametrize("spoil", [_truncate, _nan, _foreign, _no_weights, _gone])
def test_weights_that_cannot_be_trusted(cli, work, spoil):
    stage = work / VARIANTS[0]
    spoil(stage / "prune" / "model.safetensors")
    spoil(work / VARIANTS[1] / "finetune" / "model.safetensors")
    shutil.rmtree(stage / "finetune")  # the next stage would start from the spoilt weights
    before = contents(work)
    cli.refuses("run", work, saying=["prune/model.safetensors"])
    assert contents(work) == before
    cli.refuses("certify", work, "--variant", VARIANTS[1], saying=["finetune/model.safetensors"])
    assert contents(work) == before


@pytest.mark.parametrize("spoil", [_truncate, _no_weights])
def test_a_spoilt_state_is_not_gone_on_from(cli, work, spoil):
    stage = work / VARIANTS[0] / "finetune"
    shutil.rmtree(stage)
    stage.mkdir()
    torch.save({"format": "something else"}, stage / "state.pt")
    spoil(stage / "state.pt")
    before = contents(work)
    cli.refuses("run", work, saying=["state.pt", "Delete"])
    assert contents(work) == before


def test_a_ledger_of_another_network(cli, work):
    one, other = (work / "certificates" / name / "eps-0.02.jsonl" for name in VARIANTS)
    shutil.copy(other, one)
    before = contents(work)
    cli.refuses("run", work, saying=["eps-0.02.jsonl", "model"])
    cli.refuses("certify", work, "--count", "20", saying=["eps-0.02.jsonl", "model"])
    ledgers = [path for path in before if path.suffix == ".jsonl"]
    assert all(contents(work)[path] == before[path] for path in ledgers if "eps-0.01" not in path.name)


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["--eps", "-0.1"], ["--eps", "-0.1"]),
        (["--eps", "nan"], ["--eps", "nan"]),
        (["--eps", "1/0"], ["--eps"]),
        (["--method", "crwn"], ["crwn", "crown"]),
        (["--variant", "dense"], ["dense", *VARIANTS]),
        (["--index", "5"], ["--index"]),
        (["--index", "9:5"], ["--index"]),
        (["--index", "0:999999"], ["360"]),
        (["--count", "0"], ["--count"]),
        (["--count", "3", "--index", "0:3"], ["--count", "--index"]),
    ],
)
def test_wrong_requests_to_certify(cli, work, words, saying):
    before = contents(work)
    cli.refuses("certify", work, *words, saying=saying)
    assert contents(work) == before


def test_two_processes_do_not_share_a_run(cli, work):
    with runs.locked(work):
        cli.refuses("run", work, saying=["Another process"])


def test_tracebacks_only_when_asked_for(cli):
    with pytest.raises(InputError):
        main(["run", "nowhere.yaml", "--traceback"])


def test_an_unknown_option_is_a_mistake_too(cli):
    assert cli("run", "--nonsense") == 2 and "nonsense" in cli.err and "Traceback" not in cli.err


def test_ctrl_c_says_how_to_go_on(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py", "run", str(SMOKE), "output=r"])
    calls = []

    def interrupted(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("certprune.progress.PlainProgress.epoch", interrupted)
    assert cli("run", SMOKE, "output=r") == 130
    assert f"python run.py run {SMOKE} output=r" in cli.err and "Traceback" not in cli.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli("run", SMOKE, "output=r", "--stage", "pretrain") == 0
    assert "epoch 4/4" in cli.out and "epoch 3/4" not in cli.out  # three epochs stood already
