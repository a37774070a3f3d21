"""Compacted networks in files, what is refused, costs, and the kernels of a device."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import parametrize

import certprune
from certifiers.errors import InputError, UnsupportedLayer
from certprune.compact import (
    compact,
    compaction,
    cost_of,
    is_compacted,
    load_compacted,
    read_compacted,
    semi_structured,
    write_compacted,
)
from certprune.compact.semi_structured import is_two_of_four

from .nets import NETS
from .random_nets import CLASSES, SHAPE
from .test_compact import pruned, same


@pytest.mark.parametrize("ending", ["safetensors", "safetensors.gz"])
@pytest.mark.parametrize("seed", [4, 9])
def test_a_file_gives_the_network_back(seed, ending, tmp_path):
    found = compact(pruned(seed, torch.float32), SHAPE)
    path = tmp_path / f"net.{ending}"
    write_compacted(found, path)
    x = torch.rand(9, *SHAPE)
    assert torch.equal(load_compacted(path)(x), found.model(x)) and is_compacted(path)
    assert torch.equal(certprune.load(path)(x), found.model(x))
    again = read_compacted(path)
    assert (again.description, again.input_shape, again.classes) == (found.description, SHAPE, CLASSES)
    assert not again.model.training
    first = path.read_bytes()
    write_compacted(again, path)
    assert path.read_bytes() == first


def written(tmp_path, net: nn.Module | None = None, shape: tuple[int, ...] = (1, 8, 8)):
    path = tmp_path / "net.safetensors"
    write_compacted(compact(net or NETS["conv"](), shape), path)
    return path


def changed(path, change):
    """Write the file again with its header's network, and its tensors, changed."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    network = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["certprune"])
    tensors = load(content)
    change(network, tensors)
    path.write_bytes(save(tensors, {"certprune": json.dumps(network)}))


MISTAKES = {
    "unknown kind": (lambda n, t: n["layers"][0].update(kind="eval"), "kind is 'eval'"),
    "later input": (lambda n, t: n["layers"][0].update(inputs=[5]), "reads the"),
    "no layers": (lambda n, t: n.update(layers=[]), "no layers"),
    "no shape": (lambda n, t: n.pop("input_shape"), "damaged"),
    "other widths": (lambda n, t: n["layers"][0].update(out_channels=7), "not a network that certprune compact"),
    "odd option": (lambda n, t: n["layers"][0].update(colour="red"), "not a network that certprune compact"),
    "a missing weight": (lambda n, t: t.pop("conv1.weight"), "not a network that certprune compact"),
    "not finite": (lambda n, t: t["conv1.weight"].fill_(float("nan")), "not finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_that_cannot_be_trusted_is_refused(mistake, tmp_path):
    change, word = MISTAKES[mistake]
    path = written(tmp_path)
    load_compacted(path)
    changed(path, change)
    with pytest.raises(InputError, match=word):
        load_compacted(path)


def test_an_index_that_repeats_is_refused(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 2)).eval()
    net[1].weight.data[:, 5:] = 0
    path = written(tmp_path, net)
    changed(path, lambda n, t: next(v for k, v in t.items() if k.endswith("select1.index")).fill_(3))
    with pytest.raises(InputError, match="twice"):
        load_compacted(path)


def test_other_files_are_no_compacted_networks(tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(save({"a": torch.zeros(2)}))
    (tmp_path / "text").write_text("hello")
    cut = tmp_path / "cut.safetensors.gz"
    cut.write_bytes(gzip.compress(written(tmp_path).read_bytes())[:-40])
    for path, word in ((other, "not a compacted"), (tmp_path / "text", "not a compacted"), (cut, "damaged")):
        with pytest.raises(InputError, match=word):
            load_compacted(path)
    with pytest.raises(InputError, match="no file"):
        load_compacted(tmp_path / "none")
    assert not is_compacted(other) and not is_compacted(tmp_path)


# Mistakes, and kernels of the device ----------------------------------------------------------------------------


def test_mistakes_are_named():
    net = NETS["conv"]()
    with pytest.raises(InputError, match="crown or ibp"):
        compact(net, (1, 8, 8), "guess")
    with pytest.raises(InputError, match="eval mode"):
        compact(net.train(), (1, 8, 8))
    masked = certprune.sparsify(NETS["conv"](), sparsity=0.5, criterion="magnitude")
    with pytest.raises(InputError, match="materialize"):
        compact(masked, (1, 8, 8))
    assert parametrize.is_parametrized(masked[0])
    odd = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Sigmoid(), nn.Linear(3, 2)).eval()
    with pytest.raises(UnsupportedLayer, match="Sigmoid"):
        compact(odd, (1, 8, 8))


def test_a_compaction_that_went_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(compaction, "fold_affine", lambda steps: steps[:-1] + [_halved(steps[-1])])
    with pytest.raises(UnsupportedLayer, match="computes other values"):
        compact(NETS["mlp"](), (1, 8, 8))


def _halved(step):
    return replace(step, operation=replace(step.operation, weight=step.operation.weight / 2))


def test_the_model_is_left_as_it_was():
    net = NETS["bn"]()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    compact(net, (1, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert next(net.parameters()).dtype == torch.float32 and not net.training


def test_costs_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    net[0].weight.data.fill_(1.0)
    net[0].weight.data[1] = 0
    net[3].weight.data.fill_(2.0)
    net[0].bias.data.fill_(1.0)
    net[3].bias.data.fill_(0.0)
    cost = cost_of(net, (1, 4, 4))  # the convolution has 2x2 positions
    assert (cost.parameters, cost.nonzero) == (18 + 2 + 24 + 3, 9 + 2 + 24)
    assert (cost.multiply_adds, cost.nonzero_multiply_adds) == (4 * 18 + 24, 4 * 9 + 24)
    assert cost.compressed_bytes < cost.file_bytes and cost.file_bytes > 47 * 4


def test_semi_structured_kernels_need_a_device():
    with pytest.raises(InputError, match="compute capability 8.0.*the CPU"):
        semi_structured(NETS["mlp"]())
    assert is_two_of_four(torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0]]))
    assert not is_two_of_four(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]]))
    assert not is_two_of_four(torch.zeros(3, 6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_semi_structured_layers_compute_the_same():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).half().cuda().eval()
    with pytest.raises(InputError, match="2 of every 4"):
        semi_structured(net)
    net[0].weight.data[:, ::2] = 0
    fast = semi_structured(net)
    x = torch.rand(64, 128, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        assert torch.allclose(fast(x), net(x), atol=1e-2)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d((2, 3), (1, 2), (1, 0)),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.MaxPool2d(3, 2, 1),
    ],
    ids=str,
)
def test_pooling_is_written_down_again(pool):
    torch.manual_seed(0)
    width = 2 * pool(torch.zeros(1, 1, 7, 6)).numel()
    net = (
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(width, 3)).double().eval()
    )
    small = compact(net, (1, 7, 6)).model
    assert any(type(m) is type(pool) for m in small) and same(net, small, (1, 7, 6))
