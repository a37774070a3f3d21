"""Batches of an epoch: order, augmentation, replays, extra images, and files read by workers."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from certifiers.errors import InputError
from certprune.data import load_data
from certprune.data.augment import crop, flip
from certprune.data.batches import Batches, in_order
from certprune.data.extra import load_extra
from certprune.data.images import ByteImages, FileImages, View
from certprune.data.splits import Data, Split

CPU = torch.device("cpu")


def seeded(seed=0):
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def numbered(count, shape=(1, 2, 2)):
    """Image i is i / 255 everywhere, its label i % 7."""
    x = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *shape).contiguous()
    return Split(ByteImages(x), torch.arange(count) % 7)


def data_of(train, **options):
    return Data("numbered", 7, tuple(train.x.shape[1:]), train, numbered(3), numbered(3), **options)


def which(x):
    return (x[:, 0, 0, 0] * 255).round().long().tolist()


# Augmentation


def test_crop_moves_whole_images_and_fills_with_black():
    seeded()
    x = torch.rand(200, 2, 9, 7) + 0.1
    padded = torch.nn.functional.pad(x, [4] * 4)
    seen = set()
    for before, after in zip(padded, crop(x), strict=True):
        places = [(i, j) for i in range(9) for j in range(9) if torch.equal(before[:, i : i + 9, j : j + 7], after)]
        assert len(places) == 1
        seen.add(places[0])
    assert {i for i, _ in seen} == set(range(9)) == {j for _, j in seen} and len(seen) > 60


def test_flip_mirrors_about_half():
    seeded()
    x = torch.rand(400, 3, 4, 5)
    flipped = flip(x)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, x, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, x, strict=True))
    assert 150 < sum(mirrored) < 250


def test_augmentation_follows_the_seed_and_leaves_other_splits_alone():
    data = data_of(numbered(50, (1, 9, 9)), augment=("crop", "flip"))
    batches = Batches(data, 10, CPU)
    first, again, other = ([x for x, _ in batches.epoch(seeded(seed))] for seed in (0, 0, 1))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True)) and not first[0].equal(other[0])
    assert any((x == 0).any() for x in first[0][1:])  # black came in
    assert torch.cat([x for x, _ in in_order(data.train, 8, CPU)]).equal(data.train.x[:])


# Order


def test_an_epoch_is_one_pass_without_the_last_smaller_batch():
    batches = Batches(data_of(numbered(43)), 10, CPU)
    seen = [(which(x), y.tolist()) for x, y in batches.epoch(seeded())]
    assert batches.steps == 4 and [len(x) for x, _ in seen] == [10] * 4
    flat = [i for x, _ in seen for i in x]
    assert len(set(flat)) == 40 and flat != sorted(flat)
    assert all(y == [i % 7 for i in x] for x, y in seen)


def test_bytes_and_floats_give_the_same_batches():
    train = numbered(30)
    floats = Split(train.x[:], train.y)
    pairs = [list(Batches(data_of(split), 8, CPU).epoch(seeded())) for split in (train, floats)]
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(*pairs, strict=True))


def test_replays_are_the_same_batch_augmented_once():
    data = data_of(numbered(70, (1, 9, 9)), augment=("crop",))
    batches = list(Batches(data, 10, CPU).epoch(seeded(), replays=3))
    assert len(batches) == 7
    same = [a[0].equal(b[0]) for a, b in zip(batches, batches[1:], strict=False)]
    assert same == [True, True, False, True, True, False]


def test_small_sets_are_one_batch():
    batches = Batches(data_of(numbered(5)), 64, CPU)
    assert batches.steps == 1 and sorted(which(next(batches.epoch(seeded()))[0])) == [0, 1, 2, 3, 4]


# Extra images


def test_every_batch_has_its_share_of_extra_images():
    data = data_of(numbered(60), extra=20, extra_share=0.4)  # 40 of the set's own, 20 extra
    batches = Batches(data, 10, CPU)
    seen = [which(x) for x, _ in batches.epoch(seeded())]
    assert batches.steps == 6 and all(len(x) == 10 for x in seen)
    own = [[i for i in x if i < 40] for x in seen]
    assert [len(x) for x in own] == [6] * 6 and len({i for x in own for i in x}) == 36
    extra = [i for x in seen for i in x if i >= 40]
    assert len(extra) == 24 and len(set(extra[:20])) == 20  # all had their turn before one comes again


@pytest.fixture
def npz(tmp_path):
    def write(name="extra.npz", **arrays):
        numpy.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write


def pictures(count=6, shape=(8, 8, 1)):
    return numpy.random.RandomState(0).randint(0, 256, (count, *shape)).astype(numpy.uint8)


def test_extra_images_join_the_training_split_alone(npz):
    path = npz(data=pictures(), extrapolated_targets=numpy.arange(6))
    plain = load_data("digits")
    data = load_data("digits", extra=path, extra_share=0.25, augment=["flip"])
    assert (data.extra, data.extra_share, data.augment) == (6, 0.25, ("flip",))
    assert torch.equal(data.train.x[:-6], plain.train.x) and torch.equal(data.test.x, plain.test.x)
    assert torch.equal(data.validation.x, plain.validation.x)
    expected = torch.from_numpy(pictures()).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(data.train.x[-6:], expected) and data.train.y[-6:].tolist() == list(range(6))
    assert data.fingerprint != plain.fingerprint


@pytest.mark.parametrize("names", [("image", "label"), ("images", "labels"), ("data", "extrapolated_targets")])
@pytest.mark.parametrize("first", [False, True])
def test_extra_files_that_are_about(npz, names, first):
    images = pictures(4, (8, 6, 3))
    path = npz(**{names[0]: images.transpose(0, 3, 1, 2) if first else images, names[1]: numpy.array([0.0, 1, 2, 1])})
    split = load_extra(path, (3, 8, 6), 3)
    assert torch.equal(split.x.pixels, torch.from_numpy(images).permute(0, 3, 1, 2)) and split.y.tolist() == [
        0,
        1,
        2,
        1,
    ]


class Explodes:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": pictures()}, "must hold the arrays image and label"),
        ({"image": pictures() / 255, "label": numpy.arange(6)}, "must be bytes"),
        ({"image": pictures(6, (4, 4, 1)), "label": numpy.arange(6)}, "like the data set's"),
        ({"image": pictures(), "label": numpy.arange(5)}, "one an image"),
        ({"image": pictures(), "label": numpy.arange(6) - 1}, "Images without a label need one"),
        ({"image": pictures(), "label": numpy.arange(6) + 5}, "from 0 to 9"),
        ({"image": pictures(), "label": numpy.array([Explodes()] * 6, dtype=object)}, "no .npz file of plain arrays"),
    ],
)
def test_extra_errors(npz, arrays, says):
    with pytest.raises(InputError, match=says):
        load_data("digits", extra=npz(**arrays))


def test_extra_is_never_a_pickle(tmp_path):
    for name, says in (("ti.pickle", "numpy.savez"), ("missing.npz", "there is no file")):
        with pytest.raises(InputError, match=says):
            load_data("digits", extra=tmp_path / name)
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(InputError, match="no .npz file"):
        load_data("digits", extra=tmp_path / "bad.npz")
    with pytest.raises(InputError, match="fraction of each batch"):
        load_data("digits", extra=tmp_path / "missing.npz", extra_share=1.0)


@pytest.mark.parametrize(
    ("augment", "says"),
    [
        ("crop", "must be a list"),
        (["corp"], "Did you mean 'crop'"),
        (["resized_crop"], "is for imagenet"),
        ([1], "list"),
    ],
)
def test_augment_errors(augment, says):
    with pytest.raises(InputError, match=says):
        load_data("digits", augment=augment)


# Files


@pytest.fixture
def files(tmp_path):
    paths = []
    for number in range(12):
        array = numpy.random.RandomState(number).randint(0, 256, (30, 40, 3)).astype(numpy.uint8)
        Image.fromarray(array).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    return FileImages(paths, View(16, 20))


@pytest.mark.parametrize("workers", [0, 2])
def test_files_in_order_are_the_same_with_and_without_workers(files, workers):
    split = Split(FileImages(files.paths, files.view, workers), torch.arange(12))
    got = list(in_order(split, 5, CPU))
    assert [len(y) for _, y in got] == [5, 5, 2] and torch.cat([y for _, y in got]).equal(split.y)
    assert torch.cat([x for x, _ in got]).equal(files[:])


def test_random_views_follow_the_seed_not_the_workers(files):
    def epoch(workers, seed):
        train = Split(FileImages(files.paths, files.view, workers), torch.arange(12) % 7)
        batches = Batches(data_of(train, augment=("resized_crop", "flip")), 4, CPU)
        return list(batches.epoch(seeded(seed)))

    first, again, other = epoch(0, 1), epoch(2, 1), epoch(0, 2)
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(first, again, strict=True))
    assert not any(a[0].equal(b[0]) for a, b in zip(first, other, strict=True))
    assert first[0][0].shape == (4, 3, 16, 16) and first[0][0].max() <= 1


def test_reading_files_leaves_the_global_generator_alone(files):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    files.view.pixels(files.paths[0], seed=3)
    list(in_order(Split(files, torch.arange(12)), 5, CPU))
    assert torch.rand(3).equal(expected)
