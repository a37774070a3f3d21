"""The model registry: the published architectures, normalisation, the user's own, and every error."""

import sys

import pytest
import torch
from torch import nn

from certifiers.errors import InputError
from certprune.models import MODELS, Normalise, build_model, models

MNIST = (1, 28, 28)


def weights(model):
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1)


def test_cnn_small_is_the_published_network():
    model = build_model("cnn_small", MNIST, 10)
    assert [name for name, _ in model.named_children()] == [
        *("conv1", "relu1", "conv2", "relu2", "flatten", "fc1", "relu3", "fc2")
    ]
    assert (model.conv1.out_channels, model.conv1.kernel_size, model.conv1.stride) == (16, (4, 4), (2, 2))
    assert (model.conv2.out_channels, model.conv2.padding) == (32, (1, 1))
    assert (model.fc1.in_features, model.fc1.out_features) == (32 * 7 * 7, 100)
    assert weights(model) == 166_248


def test_cnn_large_is_the_published_network():
    model = build_model("cnn_large", (3, 32, 32), 10)
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
        *((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2))
    ]
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [512, 512, 10]
    assert weights(build_model("cnn_large", MNIST, 10)) == 1_973_536


@pytest.mark.parametrize("name", ["cnn7", "cnn_large", "cnn_small", "mlp"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_any_shape_gives_logits(name, shape, batch_norm):
    model = build_model(name, shape, 7, batch_norm=batch_norm, width=0.25)
    assert model(torch.rand(3, *shape)).shape == (3, 7)
    relus = sum(isinstance(m, nn.ReLU) for m in model)
    norms = sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model)
    assert norms == (relus if batch_norm else 0)


def test_batch_norm_stands_between_layer_and_relu():
    model = build_model("mlp", MNIST, 10, hidden=[5], batch_norm=True)
    assert [name for name, _ in model.named_children()] == ["flatten", "fc1", "bn1", "relu1", "fc2"]


def test_width_scales_channels_and_units():
    model = build_model("cnn_small", MNIST, 10, width=0.5)
    assert (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features) == (8, 16, 50)


def test_normalisation_is_first_traceable_and_saved():
    torch.manual_seed(0)
    model = build_model("cnn_small", (3, 8, 8), 10, mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])
    assert next(iter(model.named_children()))[0] == "normalise" and hasattr(model, "conv1")
    x = torch.rand(2, 3, 8, 8)
    expected = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.2) / 1.0, (x[:, 2] - 0.3) / 2.0], dim=1)
    torch.testing.assert_close(model.normalise(x), expected)
    assert "normalise.mean" in model.state_dict()
    assert not any(name.startswith("normalise") for name, _ in model.named_parameters())
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))


def test_one_number_normalises_every_channel():
    model = build_model("mlp", (3, 2, 2), 2, mean=0.5, std=0.25)
    torch.testing.assert_close(model.normalise(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 2.0))


def test_rows_tell_the_options():
    rows = {row.name: row for row in models()}
    assert set(rows) == set(MODELS)
    assert rows["mlp"].options == ("hidden", "width", "batch_norm", "mean", "std")
    assert all(row.summary for row in rows.values())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("cnn_smal", {}, "Did you mean 'cnn_small'"),
        ("resnet", {}, "cnn_large, cnn_resnet, cnn_small, mlp"),
        (None, {}, "Unknown model None"),
        ("cnn_small", {"widht": 2}, "Did you mean 'width'"),
        ("cnn_small", {"hidden": [3]}, "no option 'hidden'"),
        ("mlp", {"hidden": [0]}, "numbers of units"),
        ("mlp", {"hidden": [2.5]}, "numbers of units"),
        ("mlp", {"width": 0}, "positive factor"),
        ("mlp", {"width": float("nan")}, "positive factor"),
        ("mlp", {"width": "wide"}, "positive factor"),
        ("mlp", {"batch_norm": "yes"}, "true or false"),
        ("mlp", {"mean": 0.5}, "only one of them"),
        ("mlp", {"mean": [0.1, 0.2], "std": 1}, "mean must have 1 numbers"),
        ("mlp", {"mean": 0.0, "std": 0.0}, "positive"),
        ("mlp", {"mean": float("nan"), "std": 1}, "finite"),
        ("nosuchpackage.models:net", {}, "no module 'nosuchpackage'"),
        ("json:", {}, "package.module:callable"),
        ("json:dupms", {}, "Did you mean 'dumps'"),
        ("json:__name__", {}, "must name a callable"),
    ],
)
def test_errors_say_what_to_do(name, options, says):
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        build_model(name, MNIST, 10, **options)


@pytest.mark.parametrize(("shape", "classes"), [((28, 28), 10), ((1, 0, 3), 10), (MNIST, 1), (MNIST, "ten")])
def test_shape_and_classes_are_checked(shape, classes):
    with pytest.raises(InputError):
        build_model("mlp", shape, classes)


def test_too_small_images_are_refused():
    with pytest.raises(InputError, match="nothing is left"):
        build_model("cnn_small", (1, 2, 2), 10)


OWN = """
import torch
from torch import nn
def net(input_shape, classes, units=3):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    layers = nn.Linear(size, units), nn.BatchNorm1d(units), nn.Linear(units, classes)
    return nn.Sequential(nn.Flatten(), *layers)
def wrong_logits(input_shape, classes):
    return nn.Flatten()
def wrong_input(input_shape, classes):
    return nn.Linear(3, classes)
def not_a_module(input_shape, classes):
    return "model"
def one_argument(input_shape):
    return nn.Flatten()
class Net(nn.Module):
    def __init__(self, width=3, num_classes=10):
        super().__init__()
        self.fc = nn.Linear(784, num_classes)
        self.width = width
    def forward(self, x):
        return self.fc(x.flatten(1))
class Fixed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 4))
class Shaped(nn.Linear):
    def __init__(self, input_shape, classes):
        super().__init__(3, classes)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("raise RuntimeError('boom')")
    (tmp_path / "own_needs.py").write_text("import nosuchdependency")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in ("own_nets", "own_broken", "own_needs"):
        sys.modules.pop(name, None)


def test_own_model_from_the_working_folder(own):
    model = build_model("own_nets:net", MNIST, 4, units=6, mean=0.5, std=0.5)
    assert isinstance(model.normalise, Normalise) and model.model[1].out_features == 6
    assert model.training and model.model[2].num_batches_tracked == 0  # the trial run left no trace
    assert model(torch.rand(2, *MNIST)).shape == (2, 4)


def test_own_classes_are_called_by_keywords(own):
    model = build_model("own_nets:Net", MNIST, 7, width=5)
    assert model.fc.out_features == 7 and model.width == 5
    assert build_model("own_nets:Fixed", MNIST, 4)(torch.rand(2, *MNIST)).shape == (2, 4)
    with pytest.raises(InputError, match="no option 'widht'.*Did you mean 'width'"):
        build_model("own_nets:Net", MNIST, 7, widht=5)
    with pytest.raises(InputError, match="logits of shape"):
        build_model("own_nets:Fixed", MNIST, 5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_nets:Shaped", "failed on images"),
        ("own_nets:net", "no option 'unit'.*Did you mean 'units'"),
        ("own_nets:wrong_logits", "logits of shape"),
        ("own_nets:wrong_input", "failed on images"),
        ("own_nets:not_a_module", "returned a str"),
        ("own_nets:one_argument", "its signature is"),
        ("own_broken:net", "RuntimeError: boom"),
        ("own_needs:net", "needs 'nosuchdependency'"),
    ],
)
def test_own_model_errors(own, name, says):
    with pytest.raises(InputError, match=says):
        build_model(name, MNIST, 4, **({"unit": 1} if name.endswith(":net") and "nets" in name else {}))
