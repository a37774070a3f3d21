"""Checkpoints from elsewhere become runs that every command takes."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from certifiers.errors import InputError
from certifiers.verdict import read_ledger
from certprune import load, load_data, load_hydra
from certprune.exchange.importing import NAME, SHAPES, import_run
from certprune.models import build_model
from certprune.reports import read_run
from certprune.storage import write_tensors

from .test_exchange import Explodes, hydra_state, save

WORDS = ["model.hidden=[16]", "certify.methods=[ibp,crown]", "certify.attack_steps=2"]
DIGITS = {"model": "mlp", "data": "digits", "changes": WORDS}
X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def net(masked=False):
    torch.manual_seed(0)
    model = build_model("mlp", (1, 8, 8), 10, hidden=[16]).eval()
    for layer in (model.fc1, model.fc2) if masked else ():
        prune.l1_unstructured(layer, "weight", amount=0.5)
    model(X)  # torch applies its masks in a forward pass
    return model


def test_a_pruned_network_goes_through_all_commands(cli, tmp_path):
    expected, run = net(masked=True), tmp_path / "run"
    torch.save(expected.state_dict(), tmp_path / "net.pth")
    assert cli("import", tmp_path / "net.pth", "-o", run, "--model", "mlp", "--data", "digits", *WORDS) == 0, cli.err
    assert "592 of 1,184 weights are not zero" in cli.out and f"certprune certify {run}" in cli.out
    assert torch.equal(load(run / NAME)(X), expected(X))
    assert cli("certify", run, "--eps", "0.01", "--count", "6") == 0, cli.err
    header, verdicts = read_ledger(run / "certificates" / NAME / "eps-0.01.jsonl")
    assert [v.index for v in verdicts] == list(range(6)) and header["sparsity"] == 0.5
    assert cli("smooth", run, "--sigma", "0.25", "--n", "50", "--n0", "10", "--count", "2") == 0, cli.err
    assert cli("compact", run, NAME) == 0 and (run / NAME / "compacted.safetensors").exists()
    assert cli("report", run) == 0, cli.err
    assert read_run(run).variant(NAME).size["total"] == 0.5
    assert read_run(run).missing == [f"{NAME}: at eps 0.01 only 6 of 360 images are decided."]
    weights = (run / NAME / "finetune" / "model.safetensors").read_bytes()
    assert cli("run", run, "certify.eps=[0.01]", "certify.count=6") == 0, cli.err  # nothing to train
    assert (run / NAME / "finetune" / "model.safetensors").read_bytes() == weights


def test_it_says_what_file_it_was(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in net().state_dict().items()}}, path)
    run = import_run(path, tmp_path / "run", **DIGITS, command="certprune import")
    record = json.loads((run.folder / "provenance.json").read_text())
    assert record["imported"] == {"file": "net.pth", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert record["command"] == "certprune import"
    assert torch.equal(run.load_model(NAME)(X), net()(X)) and torch.equal(run.load_model("pretrain")(X), net()(X))


def test_normalisation_is_put_first_and_safetensors_are_read(tmp_path):
    write_tensors(tmp_path / "net.safetensors", net().state_dict())
    words = [*WORDS, "model.mean=0.5", "model.std=0.25"]
    run = import_run(tmp_path / "net.safetensors", tmp_path / "run", "mlp", "digits", changes=words)
    torch.testing.assert_close(run.load_model(NAME)(X), net()((X - 0.5) / 0.25))


@pytest.mark.parametrize("model", [None, "cnn_small", "cifar_model"])
def test_a_masked_checkpoint_of_hydra(tmp_path, model):
    path = save(tmp_path / "model_best.pth.tar", hydra_state())
    run = import_run(path, tmp_path / "run", model, keep=0.1)
    x = torch.rand(2, 3, 32, 32)
    assert run.recipe.model.name == "cnn_small" and run.recipe.data.name == "cifar10"
    assert torch.equal(run.load_model(NAME)(x), load_hydra(path, keep=0.1)(x))
    assert run.stage_record("finetune", NAME)["sparsity"]["total"] == pytest.approx(0.9, abs=1e-3)


def test_images_that_no_name_tells(tmp_path):
    own = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    torch.save(own.state_dict(), tmp_path / "own.pth")
    with pytest.raises(InputError, match=r"give --shape, e\.g\. 3,32,32, and --classes"):
        import_run(tmp_path / "own.pth", tmp_path / "run", "tests.test_import:own_net", "folder")
    run = import_run(tmp_path / "own.pth", tmp_path / "run", "tests.test_import:own_net", "folder", None, (3, 2, 2), 3)
    assert run.stage_record("pretrain")["input_shape"] == [3, 2, 2]
    assert torch.equal(run.load_model(NAME)[1].weight, own[1].weight)


def own_net(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


@pytest.mark.parametrize("name", ["digits", "mnist-5k"])
def test_shapes_are_those_of_the_data(name):
    data = load_data(name)
    assert SHAPES[name] == (data.shape, data.classes)


# Mistakes: an error, and no folder


def refused(tmp_path, saying, state=None, changes=(), **more):
    path = tmp_path / "bad.pth"
    torch.save(net().state_dict() if state is None else state, path)
    with pytest.raises(InputError, match=saying):
        import_run(path, tmp_path / "run", **{**DIGITS, "changes": [*WORDS, *changes], **more})
    assert not (tmp_path / "run").exists()


def test_mistakes_leave_no_folder(tmp_path):
    good = net().state_dict()
    refused(tmp_path, "does not say which network it holds. Give --model", model=None)
    refused(tmp_path, "Unknown model 'mpl'.*Did you mean 'mlp'", model="mpl")
    refused(tmp_path, r"fc1.weight should be \(16, 64\), but is nothing", {"w": torch.ones(2)})
    refused(tmp_path, r"fc1.weight should be \(16, 192\), but is \(16, 64\)", data="cifar10", input_shape=(3, 8, 8))
    refused(tmp_path, "extra should be nothing", {**good, "extra": torch.ones(2)})
    refused(tmp_path, r"not finite \(in fc1.bias\)", {**good, "fc1.bias": torch.full((16,), torch.nan)})
    refused(tmp_path, "holds no network", {"epoch": 3, "state_dict": {"a": 1}})
    refused(tmp_path, "Nothing in it was executed", {"state_dict": good, "more": Explodes()})
    refused(tmp_path, "keep is for HYDRA's checkpoints with scores", keep=0.1)
    refused(tmp_path, "hiden", changes=["model.hiden=3"])
    refused(tmp_path, "output=elsewhere came too", changes=["output=elsewhere"])
    refused(tmp_path, "has one variant", changes=["variants=[{sparsity: 0.5}]"])
    masked = net(masked=True).state_dict()
    lone = {key: value for key, value in masked.items() if key != "fc1.weight_mask"}
    refused(tmp_path, "fc1.weight_orig needs a fc1.weight_mask", lone)
    refused(tmp_path, "holds only 0 and 1", {**masked, "fc1.weight_mask": torch.full((16, 64), 0.5)})
    refused(tmp_path, "masks nothing", {**good, "fc1.weight_mask": torch.ones(16, 64)})


def test_a_folder_that_is_taken_stays_as_it_is(cli, tmp_path):
    torch.save(net().state_dict(), tmp_path / "net.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    words = ("import", tmp_path / "net.pth", "-o", tmp_path / "run", "--model", "mlp", "--data", "digits", *WORDS)
    cli.refuses(*words, saying=["is there already", "Nothing was changed"])
    cli.refuses(*words, "--shape", "8x8", saying=["--shape must be C,H,W", "'8x8'"])
    cli.refuses("import", tmp_path / "no.pth", "-o", tmp_path / "new", saying=["There is no checkpoint"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"] and not (tmp_path / "new").exists()
