"""The published architectures by their facts, and every architecture with every objective, or the reason why not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from certifiers.bounds import margin_lower_bounds
from certifiers.certification import certify
from certifiers.errors import InputError, UnsupportedLayer
from certifiers.threat import LinfBall
from certifiers.verdict import Status
from certprune.initialisation import initialise
from certprune.masks import freeze_masks, materialize, score_parameters, sparsify, weight_parameters
from certprune.models import build_model
from certprune.objectives import OBJECTIVES, build_objective, needs_bounds
from certprune.recipes import parse_recipe
from certprune.stages import check_network

from .test_objectives import ALL

CIFAR = (3, 32, 32)
OWN = "tests.test_architectures:OwnNet"
SHAPES = {"vgg16_bn": (3, 16, 16), "torchvision:squeezenet1_1": (3, 32, 32)}
SMALL = (3, 8, 8)
# Small enough to be bounded in a moment; options of each.
TINY = {
    "cnn7": {"width": 0.03},
    "cnn_resnet": {"width": 0.1, "blocks": 1},
    "vgg16_bn": {"width": 0.02},
    "wrn_28_4": {"width": 0.05},
    "resnet18": {"width": 0.04},
}
# The others of the matrix: deeper twins, those of published size, those of no registry.
MORE = {
    "mlp": {"hidden": [8]},
    "cnn_small": {"width": 0.1},
    "cnn_large": {"width": 0.05},
    OWN: {"channels": 2},
    "wrn_28_10": {"width": 0.02},
    "resnet50": {"width_per_group": 2},
    "torchvision:resnet18": {},
}
LARGE = {
    "vgg16_bn",
    "wrn_28_4",
    "wrn_28_10",
    "resnet18",
    "resnet50",
    "torchvision:resnet18",
    "torchvision:squeezenet1_1",
}
# Wide networks with shortcuts: a step of MixTrain takes minutes even on tiny images (docs/scale.md).
TOO_SLOW = {("resnet50", "mixtrain"), ("torchvision:resnet18", "mixtrain")}
# One of torchvision's with a layer whose bounds are not known, and that layer.
UNBOUNDED = {"torchvision:squeezenet1_1": "cat"}
NEEDS_BOUNDS = {"ibp", "crown_ibp", "mixtrain", "sabr", "mtl_ibp", "cc_ibp"}


def weights(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1)


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "shape", "classes", "expected", "convolutions", "norms"),
    [
        ("cnn7", CIFAR, 10, 17_189_568, 5, 6),
        ("vgg16_bn", CIFAR, 10, 15_302_848, 13, 13),
        # 27 convolutions 3x3 besides the first's, with 3 shortcuts; 25 BatchNorms
        ("wrn_28_4", CIFAR, 10, 5_841_840, 28, 25),
        ("wrn_28_10", CIFAR, 10, 36_461_232, 28, 25),
        ("resnet18", CIFAR, 10, 11_164_352, 20, 20),
        ("cnn_resnet", CIFAR, 10, 4_622_016, 49, 0),
        ("resnet50", (3, 32, 32), 1000, 25_502_912, 53, 53),
    ],
)
def test_published_sizes(name, shape, classes, expected, convolutions, norms):
    model = build_model(name, shape, classes)
    assert weights(model) == expected
    assert (count(model, nn.Conv2d), count(model, nn.BatchNorm2d) + count(model, nn.BatchNorm1d)) == (
        convolutions,
        norms,
    )


def test_every_weight_matters():
    """No block is left out of the forward pass: each weight gets a gradient."""
    for name, options in TINY.items():
        shape = SHAPES.get(name, SMALL)
        model = build_model(name, shape, 10, **options)
        initialise(model, "he", 0)
        model(torch.rand(8, *shape)).square().sum().backward()
        dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not [key for key in dead if key.endswith("weight")], (name, dead)


def test_strides_and_shortcuts_of_the_residual_nets():
    wide = build_model("wrn_28_4", CIFAR, 10, width=0.25)
    x = wide.conv1(torch.rand(2, *CIFAR))
    shapes = [tuple(x.shape[1:])]
    for block in (wide.block1, wide.block2, wide.block3):
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [block.shortcut is None for block in wide.block2] == [False, True, True, True]
    plain = build_model("cnn_resnet", CIFAR, 10)
    assert [name for name, _ in plain.named_children() if name.startswith("block")] == [
        *(f"block1_{i}" for i in range(1, 7)),
        *(f"block{g}_{i}" for g in (2, 3) for i in range(1, 6)),
    ]
    assert plain.fc1.in_features == 64 * 8 * 8 and plain.block2_1.conv1.kernel_size == (4, 4)


@pytest.mark.parametrize("name", ["vgg16_bn", "wrn_28_4", "resnet18", "cnn_resnet"])
def test_other_sizes_of_images_work_and_too_small_ones_are_refused(name):
    options = TINY[name]
    assert build_model(name, (1, 28, 28), 7, **options)(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    with pytest.raises(InputError, match="at least, or the model 'mlp'"):
        build_model(name, (3, 3, 3), 10, **options)
    with pytest.raises(InputError, match="positive factor"):
        build_model(name, CIFAR, 10, **{**options, "width": -1.0})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("torchvision:resnet1", {}, "Did you mean resnet1"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "not options"),
        ("torchvision:resnet18", {"widht": 2}, "could not build"),
        ("torchvision:googlenet", {"aux_logits": True}, "auxiliary"),
        ("cnn_resnet", {"blocks": 0}, "blocks must be"),
    ],
)
def test_errors(name, options, says):
    with pytest.raises(InputError, match=says):
        build_model(name, (3, 64, 64), 10, **options)


def test_torchvision_takes_colour_images():
    with pytest.raises(InputError, match="3 channels"):
        build_model("torchvision:resnet18", (1, 28, 28), 10)


def test_a_torchvision_network_is_masked_and_bounded():
    model = build_model("torchvision:resnet18", (3, 32, 32), 5, mean=0.5, std=0.25)
    assert weights(model.model) == 11_166_912 + 5 * 512 and next(model.children()).mean.shape == (3, 1, 1)
    sparsify(model, sparsity=0.9)
    loss, _ = build_objective({"name": "ibp", "eps": 0.01})(model, torch.rand(2, 3, 32, 32), torch.arange(2), 1.0)
    loss.backward()
    assert len(score_parameters(model)) == 21 and all(s.grad is not None for s in score_parameters(model))


def test_he_start_scales_with_what_comes_out():
    model = build_model("wrn_28_4", CIFAR, 10, width=0.5)
    initialise(model, "he", 3)
    conv = model.block3[1].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.02)
    again = build_model("wrn_28_4", CIFAR, 10, width=0.5)
    initialise(again, "he", 3)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


class OwnNet(nn.Module):
    """As a user writes one: a class that a recipe names by its import path."""

    def __init__(self, num_classes, channels=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.out = nn.Linear(channels * 36, num_classes)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.conv(x))).flatten(1))


def in_stage(model, stage):
    """The model as that stage trains it, and what it trains."""
    if stage == "prune":
        sparsify(model, sparsity=0.5, budget="uniform")
        return score_parameters(model)
    if stage == "finetune":
        freeze_masks(model)
    return weight_parameters(model)


def matrix(name):
    """Each stage by each objective; large networks with the tests that take long."""
    return pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name


@pytest.mark.parametrize("name", [matrix(name) for name in sorted({**TINY, **MORE, **UNBOUNDED})])
def test_every_objective_trains_in_every_stage_or_says_why_not(name):
    """The matrix: one step gives whatever the stage trains a gradient."""
    shape = SHAPES.get(name, SMALL)
    torch.manual_seed(0)
    model = build_model(name, shape, 10, mean=[0.5] * 3, std=[0.25] * 3, **{**TINY, **MORE}.get(name, {}))
    initialise(model, "ibp", 0)
    x, y = torch.rand(4, *shape), torch.arange(4)
    for stage in ("pretrain", "prune", "finetune"):
        trained = in_stage(model, stage)
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is one for one in trained))
        for objective in (each for each in OBJECTIVES if (name, each) not in TOO_SLOW):
            cheap = {key: 1 for key in ("steps", "images") if key in OBJECTIVES[objective].model_fields}
            if name in LARGE and "eps" in ALL[objective]:
                cheap["eps"] = 1e-4  # interval bounds of 50 layers from their start grow by 1e32, to the end of float32
            step = build_objective({**ALL[objective], **cheap})
            assert needs_bounds(step) == (objective in NEEDS_BOUNDS)
            if name in UNBOUNDED and objective in NEEDS_BOUNDS:
                with pytest.raises(UnsupportedLayer, match=UNBOUNDED[name]):
                    step(model, x, y, 1.0)
                continue
            model.zero_grad()
            loss, _ = step(model, x, y, 1.0)
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in trained), (stage, objective)


@pytest.mark.parametrize(
    ("objective", "certify", "says"),
    [
        ("ibp", {"methods": ["attack"]}, "the objective ibp cannot be had of the model torchvision:squeezenet1_1"),
        ("adversarial", {"methods": ["crown"]}, r"certify.methods \(crown\) cannot"),
        ("adversarial", {"methods": ["attack"]}, None),
        ("gaussian", {}, None),
    ],
)
def test_a_recipe_says_before_training_what_cannot_be_bounded(objective, certify, says):
    content = {"name": "r", "data": {"name": "x"}, "model": {"name": "torchvision:squeezenet1_1"}}
    recipe = parse_recipe({**content, "objective": ALL[objective], "certify": certify, "variants": [{"dense": True}]})
    data = SimpleNamespace(shape=(3, 32, 32), classes=10)
    if says is None:
        return check_network(recipe, data)
    with pytest.raises(UnsupportedLayer, match=says + r".*methods: \[attack\]"):
        check_network(recipe, data)


@pytest.mark.parametrize("name", sorted(TINY))
def test_bounds_hold_on_sampled_points(name):
    shape = SHAPES.get(name, SMALL)
    model = build_model(name, shape, 5, mean=0.5, std=0.25, **TINY[name])
    initialise(model, "he", 0)
    model(torch.rand(16, *shape))  # running statistics that are not the first ones
    sparsify(model, sparsity=0.3)
    model = materialize(model).eval()
    x, y = torch.rand(3, *shape), torch.tensor([0, 1, 2])
    lower = {m: margin_lower_bounds(model, x, y, LinfBall(0.02), m) for m in ("ibp", "crown-ibp")}
    for _ in range(20):
        point = (x + torch.empty_like(x).uniform_(-0.02, 0.02).sign() * 0.02).clamp(0, 1)
        logits = model(point)
        margin = logits.gather(1, y[:, None]) - logits
        for bound in lower.values():
            assert (margin >= bound - 1e-4 * (1 + bound.abs())).all()


def test_an_attack_alone_never_certifies():
    shape = SHAPES["torchvision:squeezenet1_1"]
    model = build_model("torchvision:squeezenet1_1", shape, 3).eval()
    x = torch.rand(4, *shape)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 3
    verdicts = certify(model, x, y, LinfBall(0.001), "attack", attack_steps=2)
    assert verdicts[0].status == Status.misclassified
    assert all(v.status in (Status.unknown, Status.falsified) and v.method == "attack" for v in verdicts[1:])
    far = certify(model, x, y, LinfBall(1.0), "attack", attack_steps=20)
    assert sum(v.status == Status.falsified for v in far) >= 1
