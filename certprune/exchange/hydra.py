"""Networks out of HYDRA's own checkpoints (Sehwag et al. 2020), so that its model zoo can be certified here.

A checkpoint is a dict with `arch` and `state_dict`; a masked layer has `popup_scores` beside its weight, and keeps
the weights with the largest absolute scores. Nothing in the file is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certprune.exchange.states import read_checkpoint, state_of
from certprune.models import build_model
from certprune.registry import unknown_name

# HYDRA's name of an architecture -> ours. Layers stand in the same order in both.
ARCHITECTURES = {
    "ResNet50": "resnet50",
    "cifar_model": "cnn_small",
    "cifar_model_large": "cnn_large",
    "mnist_model": "cnn_small",
    "mnist_model_large": "cnn_large",
    "resnet18": "resnet18",
    "vgg16_bn": "vgg16_bn",
    "wrn_28_10": "wrn_28_10",
    "wrn_28_4": "wrn_28_4",
}
SCORES = ".popup_scores"
UNUSED = "sub_block1."  # HYDRA's wide nets hold a block that their forward pass leaves out


def load_hydra(
    path: str | Path,
    keep: float | None = None,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    arch: str | None = None,
    **options,
) -> nn.Module:
    """The plain network of one of HYDRA's checkpoints, in evaluation mode, pixels in [0, 1].

    Args:
        path: the checkpoint (`model_best.pth.tar`), or its dense form (`model_best_dense.pth.tar`).
        keep: HYDRA's k, the fraction of weights that each layer keeps: 0.1 for "90 % pruned", 1.0 for a pretrained
            network. A masked checkpoint does not hold it, so it must be given; a dense one has no scores to rank.
        arch: HYDRA's name of the architecture (:data:`ARCHITECTURES`), or ours; None takes the file's.
        options: of :func:`build_model`; HYDRA normalises ImageNet alone (`mean`, `std`).

    Raises:
        InputError: a file that is no such checkpoint, or holds anything but tensors and plain values; an unknown
            architecture; a network of other shapes; a `keep` that is missing or outside (0, 1].
    """
    told, state = _read(Path(path))
    name = arch or told
    ours = name if name in ARCHITECTURES.values() else ARCHITECTURES.get(name)
    if ours is None:
        raise unknown_name("architecture of HYDRA", name, ARCHITECTURES, more=". Give it as arch= (--model)")
    model = build_model(ours, input_shape, classes, **options)
    weights = _plain_weights(state, keep, path)
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("normalise.")}
    theirs = {key: value for key, value in weights.items() if not key.startswith(UNUSED)}
    _check_alike(own, theirs, name, path)
    renamed = dict(zip(own, theirs.values(), strict=True))
    model.load_state_dict({**model.state_dict(), **renamed})
    return model.eval()


def _read(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The name of the architecture, where it is there, and the tensors."""
    content = read_checkpoint(path)
    state = state_of(content)
    if state is None:
        raise InputError(f"{path} is none of HYDRA's checkpoints: it should be a dict with tensors under state_dict.")
    return content.get("arch"), state


def _plain_weights(state: Mapping[str, Tensor], keep: float | None, path: str | Path) -> dict[str, Tensor]:
    """Weights without scores, each set to 0 where its scores are among the smallest."""
    plain = {key: value for key, value in state.items() if not key.endswith(SCORES)}
    scores = {key.removesuffix(SCORES) + ".weight": value for key, value in state.items() if key.endswith(SCORES)}
    if not scores:
        return plain
    number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
    if not number or not 0 < keep <= 1:
        raise InputError(
            f"{path} has scores, but not how many weights they keep. Give keep, HYDRA's k: 0.1 for a network of which "
            f"90 % are pruned, 1.0 for one that is not pruned ({keep!r} came)."
        )
    for key, score in scores.items():
        if key not in plain or plain[key].shape != score.shape or not torch.isfinite(score).all():
            raise InputError(f"{path}: the scores of {key!r} do not fit a weight, or are not finite. Get it again.")
        removed = int((1 - keep) * score.numel())  # rounded as HYDRA does; of equal scores it leaves the order open
        gone = score.abs().flatten().sort(stable=True).indices[:removed]
        masked = plain[key].clone().flatten()
        masked[gone] = 0
        plain[key] = masked.view_as(score)
    return plain


def _check_alike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str, path: str | Path) -> None:
    if len(ours) != len(theirs):
        raise InputError(
            f"{path} should hold {len(ours)} tensors of the architecture {name}, but holds {len(theirs)}. Is it "
            "another architecture? Give its name as arch=."
        )
    for (mine, tensor), (key, value) in zip(ours.items(), theirs.items(), strict=True):
        if mine.rsplit(".", 1)[-1] != key.rsplit(".", 1)[-1] or tensor.shape != value.shape:
            raise InputError(
                f"{path} holds another network than {name} for these images and classes: {mine} should be "
                f"{tuple(tensor.shape)}, but {key} is {tuple(value.shape)}. Give arch=, input_shape= and classes=."
            )
        if not torch.isfinite(value).all():
            raise InputError(f"{path} holds numbers that are not finite (in {key}). Get it again.")
