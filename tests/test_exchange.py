"""Masks of torch.nn.utils.prune in and out, HYDRA's checkpoints, and a model as RobustBench wants it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import certprune
from certifiers import LinfBall, certify
from certifiers.errors import InputError
from certprune import from_torch_prune, load_hydra, materialize, sparsify, sparsity, to_torch_prune
from certprune.exchange.hydra import ARCHITECTURES
from certprune.masks import apply_masks, freeze_masks, mask_state, score_parameters
from certprune.models import build_model


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    return nn.Sequential(*layers).eval()


X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# torch.nn.utils.prune


def test_masks_come_in_with_the_same_outputs():
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[4], "weight", amount=0.25, n=2, dim=1)
    expected, original = model(X), model[4].weight_orig.detach().clone()
    mask = model[4].weight_mask.bool()
    assert from_torch_prune(model) is model
    assert torch.equal(model(X), expected)
    assert torch.equal(mask_state(model)["4.weight"], mask) and not hasattr(model[4], "weight_mask")
    assert torch.equal(model[4].parametrizations.weight.original, original)  # the weights below the mask are kept
    assert sparsity(model).kept == 18 + 540
    model[4].parametrizations.weight.original.data += 1.0
    assert (model[4].weight[~mask] == 0).all()
    assert torch.equal(materialize(model)(X), model(X))


def test_layers_that_were_not_pruned_stay_plain():
    model = net()
    prune.random_unstructured(model[4], "weight", amount=10)
    from_torch_prune(model)
    assert set(mask_state(model)) == {"4.weight"} and type(model[0]) is nn.Conv2d


def test_masks_go_out_and_come_back():
    model = sparsify(net(), sparsity=0.7, criterion="score")
    assert score_parameters(model)
    expected, masks = model(X), mask_state(model)
    theirs = to_torch_prune(model)
    assert torch.equal(theirs(X), expected) and score_parameters(model)  # a copy
    assert prune.is_pruned(theirs) and torch.equal(theirs[0].weight_mask.bool(), masks["0.weight"])
    assert torch.equal(theirs[0].weight_orig, model[0].parametrizations.weight.original)
    # What torch.nn.utils.prune does with them: pruned weights stay 0 while the others train.
    theirs(X).square().sum().backward()
    assert (theirs[0].weight_orig.grad[~masks["0.weight"]] == 0).all() and theirs[0].weight_orig.grad.abs().sum() > 0
    back = from_torch_prune(theirs)
    assert all(torch.equal(mask_state(back)[key], mask) for key, mask in masks.items())
    assert torch.equal(back(X), expected)


def test_a_saved_state_with_masks_is_read():
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    state, expected = model.state_dict(), model(X)
    fresh = net()
    prune.identity(fresh[0], "weight")
    fresh.load_state_dict(state)
    fresh(X)  # torch applies the mask in a forward pass
    assert torch.equal(from_torch_prune(fresh)(X), expected)


def test_errors_of_masks_change_nothing():
    with pytest.raises(InputError, match="No layer .* is pruned"):
        from_torch_prune(net())
    with pytest.raises(InputError, match="no masks to export"):
        to_torch_prune(net())
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=2)
    prune.l1_unstructured(model[0], "bias", amount=2)
    with pytest.raises(InputError, match="pruned in its bias"):
        from_torch_prune(model)
    assert prune.is_pruned(model)
    model = net()
    prune.l1_unstructured(model[1], "weight", amount=2)
    with pytest.raises(InputError, match="a BatchNorm2d"):
        from_torch_prune(model)
    model = net()
    prune.custom_from_mask(model[0], "weight", torch.full((4, 1, 3, 3), 0.5))
    with pytest.raises(InputError, match="only 0 and 1"):
        from_torch_prune(model)


# HYDRA


def hydra_state(small=True):
    """The layout of HYDRA's cifar_model: layers by number, `popup_scores` beside each weight."""
    torch.manual_seed(3)
    shapes = {"0": (16, 3, 4, 4), "2": (32, 16, 4, 4), "5": (100, 2048), "7": (10, 100)}
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape) * 0.05
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.05
        state[f"{name}.popup_scores"] = torch.randn(shape)
    return state


def save(path, state, **more):
    torch.save({"epoch": 7, "arch": "cifar_model", "state_dict": state, "best_prec1": 51.5, **more}, path)
    return path


def by_hand(state, keep, x):
    """HYDRA's forward pass of cifar_model: each layer uses the weights whose |score| is among the largest."""
    for name, stride in (("0", 2), ("2", 2), ("5", None), ("7", None)):
        scores = state[f"{name}.popup_scores"].abs().flatten()
        mask = torch.ones_like(scores)
        mask[scores.argsort()[: int((1 - keep) * len(scores))]] = 0
        weight, bias = state[f"{name}.weight"] * mask.view_as(state[f"{name}.weight"]), state[f"{name}.bias"]
        x = (
            nn.functional.conv2d(x, weight, bias, stride, 1)
            if stride
            else nn.functional.linear(x.flatten(1), weight, bias)
        )
        x = x if name == "7" else x.relu()
    return x


@pytest.mark.parametrize("keep", [0.01, 0.1, 1.0])
def test_a_masked_checkpoint_of_hydra(tmp_path, keep):
    state = hydra_state()
    model = load_hydra(save(tmp_path / "model_best.pth.tar", state), keep=keep)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(model(x), by_hand(state, keep, x))
    assert not model.training and sparsity(model).total == pytest.approx(1 - keep, abs=1e-3)
    assert {v.status for v in certify(model, x, model(x).argmax(1), LinfBall(1e-4), "ibp")}


def test_dense_and_parallel_checkpoints(tmp_path):
    state = {key: value for key, value in hydra_state().items() if not key.endswith("popup_scores")}
    path = save(tmp_path / "dense.pth.tar", {f"module.{key}": value for key, value in state.items()})
    model = load_hydra(path, mean=0.5, std=0.5)
    assert torch.equal(model.conv2.weight, state["2.weight"]) and model.normalise.mean.tolist() == [[[0.5]]] * 3


@pytest.mark.parametrize(("arch", "shape"), [("wrn_28_4", (3, 32, 32)), ("vgg16_bn", (3, 32, 32))])
def test_other_architectures_by_the_order_of_their_layers(tmp_path, arch, shape):
    """HYDRA declares the same layers in the same order under other names, and one block that it never uses."""
    model = build_model(ARCHITECTURES[arch], shape, 10).eval()
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    state = {f"layer{i}.{key.rsplit('.', 1)[-1]}": v for i, (key, v) in enumerate(model.state_dict().items())}
    if arch == "wrn_28_4":
        state["sub_block1.layer.0.bn1.weight"] = torch.ones(16)
    loaded = load_hydra(save(tmp_path / "x.pth", state, arch=arch))
    x = torch.rand(2, *shape)
    assert torch.equal(loaded(x), model(x))


class Explodes:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


def test_hydra_errors(tmp_path):
    state = hydra_state()
    path = save(tmp_path / "a.pth", state)
    for keep in (None, 0.0, 1.5, "0.1"):
        with pytest.raises(InputError, match="Give keep, HYDRA's k"):
            load_hydra(path, keep=keep)
    with pytest.raises(InputError, match="Unknown architecture of HYDRA 'vgg12'"):
        load_hydra(path, keep=0.1, arch="vgg12")
    with pytest.raises(InputError, match="holds another network than cifar_model"):
        load_hydra(path, keep=0.1, classes=100)
    with pytest.raises(InputError, match="tensors of the architecture"):
        load_hydra(path, keep=0.1, arch="vgg16_bn")
    with pytest.raises(InputError, match="no checkpoint"):
        load_hydra(tmp_path / "b.pth", keep=0.1)
    with pytest.raises(InputError, match="Nothing in it was executed"):
        load_hydra(save(tmp_path / "c.pth", state, optimizer=Explodes()), keep=0.1)
    (tmp_path / "d.pth").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        load_hydra(tmp_path / "d.pth", keep=0.1)
    torch.save([1, 2], tmp_path / "e.pth")
    with pytest.raises(InputError, match="none of HYDRA's checkpoints"):
        load_hydra(tmp_path / "e.pth", keep=0.1)
    with pytest.raises(InputError, match="not finite"):
        load_hydra(save(tmp_path / "f.pth", {**state, "7.bias": torch.full((10,), torch.nan)}), keep=0.1)


# RobustBench's convention: a plain nn.Module, images in [0, 1], logits out


def test_what_certprune_gives_is_a_plain_module_of_images_in_0_1():
    model = build_model("cnn_small", (1, 8, 8), 5, width=0.25, mean=0.5, std=0.25)
    masked = apply_masks(model, {"conv1.weight": torch.rand(4, 1, 4, 4) > 0.5})
    plain = materialize(freeze_masks(masked)).eval()
    assert isinstance(plain, nn.Module) and not any("parametrizations" in key for key in plain.state_dict())
    shifted = (X - 0.5) / 0.25
    bare = nn.Sequential(*list(plain.children())[1:])
    assert torch.equal(plain(X), bare(shifted)) and plain(X).shape == (6, 5)
    assert callable(certprune.load)
