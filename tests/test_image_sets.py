"""CIFAR, SVHN, ImageNet and Tiny-ImageNet, out of small files in each set's own format; and every error."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from certifiers.bridges import import_torchvision
from certifiers.errors import InputError
from certprune.data import cifar, datasets, imagenet, load_data
from certprune.data.fetch import Archive
from certprune.data.images import ByteImages, FileImages

RANDOM = numpy.random.RandomState


def pixels(count, seed=0, side=32):
    return RANDOM(seed).randint(0, 256, (count, 3, side, side)).astype(numpy.uint8)


def write_cifar(folder, hundred=False):
    """The binary version: a record is the label byte (100: the coarse one, the fine one), then 3,072 pixels."""
    folder.mkdir(parents=True)
    files = ["train.bin", "test.bin"] if hundred else [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for seed, name in enumerate(files):
        count = 200 if hundred else 40
        labels = numpy.arange(count) % (100 if hundred else 10)
        columns = [labels // 5, labels] if hundred else [labels]
        records = numpy.concatenate([numpy.stack(columns, 1), pixels(count, seed).reshape(count, -1)], 1)
        records.astype(numpy.uint8).tofile(folder / name)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def no_network(monkeypatch):
    """A download that fails, and says where it would have come from."""

    def refuse(request, *args, **kwargs):
        raise OSError(f"no network for {request.full_url}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# CIFAR


def test_cifar10_reads_the_binary_version(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-bin")
    data = load_data("cifar10", root=tmp_path)
    assert (data.classes, data.shape, data.augment) == (10, (3, 32, 32), ("crop", "flip"))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [180, 20, 40]
    assert isinstance(data.train.x, ByteImages)
    expected = torch.from_numpy(pixels(40, 5)).float() / 255  # in the order of the file, to the bit
    assert torch.equal(data.test.x[:], expected) and data.test.y.tolist() == [i % 10 for i in range(40)]
    assert data.test.x[3].shape == (3, 32, 32) and data.test.x[2:5].dtype == torch.float32
    both = sorted(image.numpy().tobytes() for split in (data.train, data.validation) for image in split.x[:])
    written = numpy.concatenate([pixels(40, seed) for seed in range(5)])
    assert both == sorted((image.astype(numpy.float32) / 255).tobytes() for image in written)


def test_cifar100_takes_the_fine_label(tmp_path):
    write_cifar(tmp_path / "here", hundred=True)
    data = load_data("cifar100", root=tmp_path / "here", validation=0.5)
    assert data.classes == 100 and data.test.y.tolist() == [i % 100 for i in range(200)]


def test_cifar_unpacks_an_archive_whose_checksum_is_right(tmp_path, monkeypatch, no_network):
    write_cifar(tmp_path / "made" / "cifar-10-batches-bin")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    with pytest.raises(InputError, match="its MD5 is not c32a1d4ab5d03f1284b67883e8d87530"):
        load_data("cifar10", root=root)
    right = Archive(cifar.CIFAR10.archive.url, md5(root / "cifar-10-binary.tar.gz"))
    monkeypatch.setattr(cifar, "CIFAR10", dataclasses.replace(cifar.CIFAR10, archive=right))
    assert len(load_data("cifar10", root=root).test) == 40


def test_cifar_errors_say_what_to_do(tmp_path, no_network):
    with pytest.raises(InputError, match="no network.*put cifar-10-binary.tar.gz .* into"):
        load_data("cifar10", root=tmp_path)
    with pytest.raises(InputError, match="download is false"):
        load_data("cifar10", root=tmp_path, download=False)
    with pytest.raises(InputError, match="download must be true or false"):
        load_data("cifar10", root=tmp_path, download="no")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match="pickles, which are never read here"):
        load_data("cifar10", root=tmp_path, download=False)
    write_cifar(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(InputError, match="lacks data_batch_3.bin"):
        load_data("cifar10", root=tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(InputError, match="records of 3073 bytes"):
        load_data("cifar10", root=tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(b"\x0a" + b"\0" * 3072)
    with pytest.raises(InputError, match="10 is among its labels"):
        load_data("cifar10", root=tmp_path)


# SVHN


def write_svhn(folder, monkeypatch, splits=("train", "test", "extra")):
    """X (32, 32, 3, n) and y (n, 1) with 10 for the digit 0, and torchvision's table with the files' checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    table = dict(import_torchvision().datasets.SVHN.split_list)
    for seed, split in enumerate(splits):
        x = pixels(100, seed).transpose(2, 3, 1, 0)
        savemat(folder / f"{split}_32x32.mat", {"X": x, "y": (numpy.arange(100) % 10 + 1)[:, None].astype(numpy.uint8)})
        table[split] = [table[split][0], table[split][1], md5(folder / f"{split}_32x32.mat")]
    monkeypatch.setattr(import_torchvision().datasets.SVHN, "split_list", table)


def test_svhn_reads_the_mat_files(tmp_path, monkeypatch):
    write_svhn(tmp_path / "svhn", monkeypatch)
    data = load_data("svhn", root=tmp_path)
    assert (data.classes, data.shape, data.augment) == (10, (3, 32, 32), ("crop",))
    assert data.test.y.tolist() == [(i + 1) % 10 for i in range(100)]
    assert torch.equal(data.test.x[:], torch.from_numpy(pixels(100, 1)).float() / 255)
    assert len(data.train) + len(data.validation) == 100
    more = load_data("svhn", root=tmp_path / "svhn", with_extra=True)
    assert len(more.train) + len(more.validation) == 200 and len(more.test) == 100


def test_torchvision_reads_the_same_svhn(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    theirs = import_torchvision().datasets.SVHN(str(tmp_path), "test")
    data = load_data("svhn", root=tmp_path)
    assert torch.equal(data.test.x.pixels, torch.from_numpy(theirs.data.copy()))
    assert data.test.y.tolist() == theirs.labels.tolist()


def test_svhn_errors(tmp_path, monkeypatch, no_network):
    with pytest.raises(InputError, match="no network.*put train_32x32.mat .* into"):
        load_data("svhn", root=tmp_path)
    with pytest.raises(InputError, match="with_extra must be"):
        load_data("svhn", root=tmp_path, with_extra=1)
    write_svhn(tmp_path, monkeypatch)
    with open(tmp_path / "test_32x32.mat", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="is damaged or another file"):
        load_data("svhn", root=tmp_path)


# ImageNet


def write_images(folder, count, seed, size=(60, 40)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        array = RANDOM(seed + number).randint(0, 256, (size[1], size[0], 3)).astype(numpy.uint8)
        Image.fromarray(array).save(folder / f"{folder.name}_{number}.JPEG")


@pytest.fixture
def small_imagenet(tmp_path):
    for number, name in enumerate(("n02", "n01", "n03")):
        write_images(tmp_path / "train" / name, 10, 100 * number)
        write_images(tmp_path / "val" / name, 3, 100 * number + 50, size=(40, 64))
    return tmp_path


def test_imagenet_is_read_when_needed(small_imagenet):
    data = load_data("imagenet", root=small_imagenet, size=16, resize=24, workers=0)
    assert (data.classes, data.shape, data.augment) == (3, (3, 16, 16), ("resized_crop", "flip"))
    assert isinstance(data.train.x, FileImages) and [len(data.train), len(data.validation), len(data.test)] == [
        27,
        3,
        9,
    ]
    for path, label in zip(data.train.x.paths, data.train.y.tolist(), strict=True):
        assert path.parent.name == ("n01", "n02", "n03")[label]  # sorted names
    assert data.test.x[:2].shape == (2, 3, 16, 16) and data.test.x[0].max() <= 1
    assert len({path.parent.name for path in data.test.x.paths[:5]}) > 1  # the first n are of several classes


def test_the_middle_is_what_torchvision_cuts(small_imagenet):
    data = load_data("imagenet", root=small_imagenet, size=16, resize=24, workers=0)
    import_torchvision()
    from torchvision import transforms

    cut = transforms.Compose([transforms.Resize(24), transforms.CenterCrop(16), transforms.PILToTensor()])
    path = data.test.x.paths[0]
    expected = cut(Image.open(path).convert("RGB")).float() / 255
    assert (data.test.x[0] - expected).abs().max() <= 2 / 255


def test_imagenet_errors(tmp_path, small_imagenet):
    with pytest.raises(InputError, match="n01440764"):
        load_data("imagenet", root=tmp_path / "nowhere")
    for options, says in (({"size": 0}, "size"), ({"size": 300}, "resize"), ({"workers": -1}, "workers")):
        with pytest.raises(InputError, match=says):
            load_data("imagenet", root=small_imagenet, **options)
    (small_imagenet / "val" / "n09").mkdir()
    with pytest.raises(InputError, match="classes that .* has not: n09"):
        load_data("imagenet", root=small_imagenet)
    shutil.rmtree(small_imagenet / "val" / "n09")
    (small_imagenet / "train" / "n01" / "n01_0.JPEG").write_bytes(b"no image")
    data = load_data("imagenet", root=small_imagenet, workers=0)
    with pytest.raises(InputError, match="n01_0.JPEG cannot be read"):
        data.train.x[:], data.validation.x[:]


# Tiny-ImageNet


def write_tiny(folder, classes=3):
    names = [f"n{number:02d}" for number in range(classes, 0, -1)]
    for number, name in enumerate(names):
        write_images(folder / "train" / name / "images", 10, 100 * number, size=(64, 64))
    write_images(folder / "val" / "images", 6, 900, size=(64, 64))
    (folder / "wnids.txt").write_text("\n".join(names))
    rows = [f"images_{i}.JPEG\t{names[i % classes]}\t0\t0\t62\t62" for i in range(6)]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")


def test_tiny_imagenet(tmp_path):
    write_tiny(tmp_path / "tiny-imagenet-200")
    data = load_data("tiny-imagenet", root=tmp_path, workers=0)
    assert (data.classes, data.shape, data.augment) == (3, (3, 64, 64), ("crop", "flip"))
    found = {path.name: label for path, label in zip(data.test.x.paths, data.test.y.tolist(), strict=True)}
    assert found == {f"images_{i}.JPEG": 2 - i % 3 for i in range(6)}  # numbered by sorted names
    path = data.test.x.paths[0]
    with Image.open(path) as image:
        expected = torch.from_numpy(numpy.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(data.test.x[0], expected)


def test_tiny_imagenet_errors(tmp_path, monkeypatch, no_network):
    with pytest.raises(InputError, match="no network.*tiny-imagenet-200.zip"):
        load_data("tiny-imagenet", root=tmp_path)
    write_tiny(tmp_path / "made" / "tiny-imagenet-200")
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as file:
        for path in sorted((tmp_path / "made").rglob("*")):
            file.write(path, path.relative_to(tmp_path / "made"))
    monkeypatch.setattr(imagenet, "TINY", Archive(imagenet.TINY.url, md5(tmp_path / "tiny-imagenet-200.zip")))
    assert len(load_data("tiny-imagenet", root=tmp_path).test) == 6
    (tmp_path / "tiny-imagenet-200" / "val" / "images" / "images_3.JPEG").unlink()
    with pytest.raises(InputError, match="there is no .*images_3.JPEG"):
        load_data("tiny-imagenet", root=tmp_path)
    (tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text("images_0.JPEG\tn99\n")
    with pytest.raises(InputError, match="names no image and class"):
        load_data("tiny-imagenet", root=tmp_path)


# What can be used here


def test_rows_say_what_is_at_hand(tmp_path):
    before = {row.name: row for row in datasets(tmp_path)}
    for name in ("cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet"):
        assert not before[name].available and str(tmp_path) in before[name].missing and before[name].summary
    write_cifar(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    after = {row.name: row.available for row in datasets(tmp_path)}
    assert after["cifar10"] and after["imagenet"] and not after["svhn"]


# Real images


def real_images(name):
    """The real images of a data set that foolbox carries: (arrays, labels)."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None:
        pytest.skip("foolbox, which carries 20 real images of each data set, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    paths = sorted(folder.glob(f"{name}_[0-9]*"))
    assert len(paths) == 20
    return paths, [int(path.stem.split("_")[-1]) for path in paths]


def test_real_cifar10_images(tmp_path):
    paths, labels = real_images("cifar10")
    write_cifar(tmp_path / "cifar-10-batches-bin")
    arrays = numpy.stack([numpy.asarray(Image.open(path).convert("RGB")) for path in paths])
    planes = arrays.transpose(0, 3, 1, 2).reshape(20, -1)
    records = numpy.concatenate([numpy.array(labels)[:, None], planes], 1).astype(numpy.uint8)
    records.tofile(tmp_path / "cifar-10-batches-bin" / "test_batch.bin")
    data = load_data("cifar10", root=tmp_path)
    assert data.test.y.tolist() == labels
    assert torch.equal(data.test.x[:], torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255)
    # Photos, not noise: neighbours are alike, and the red plane comes first (frog 4 is brown, plane 3's sky is blue).
    x = data.test.x[:]
    assert (x[..., 1:] - x[..., :-1]).abs().mean() < 0.1


def test_real_imagenet_photos(tmp_path):
    paths, labels = real_images("imagenet")
    for path, label in zip(paths, labels, strict=True):
        for split, copies in (("train", 4), ("val", 1)):
            folder = tmp_path / split / f"n{label:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                shutil.copy(path, folder / f"{path.stem}_{copy}.JPEG")
    data = load_data("imagenet", root=tmp_path, validation=0.25, workers=0)
    assert data.shape == (3, 224, 224) and data.classes == len(set(labels)) and len(data.test) == 20
    x = data.test.x[:4]
    assert x.shape == (4, 3, 224, 224) and 0 <= x.min() < 0.1 and 0.9 < x.max() <= 1
    assert (x[..., 1:] - x[..., :-1]).abs().mean() < 0.1
