"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690) by its authors' package: four attacks without parameters."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certifiers.threat import Threat

NORMS = {"linf": "Linf", "l2": "L2"}
TARGETS = 9  # classes aimed at by the targeted attacks, as published


def autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int = 0) -> Tensor:
    """Inputs that AutoAttack's standard version found to be misclassified, shaped like `x`; NaN where it found none.

    They are claims: whether one lies in the threat set and is predicted wrongly is for the caller to test. Networks of
    fewer than four classes are attacked without the targeted difference-of-logits-ratio loss, which needs four. What
    is found may depend on which inputs share a batch. torch's and Python's random numbers stay as they are.

    Raises InputError where the package is missing, and for inputs that are no (batch, channels, height, width).
    """
    if len(x) == 0:
        return x.clone()
    package = _import()
    if x.dim() != 4:
        raise InputError(
            f"AutoAttack needs images of shape (batch, channels, height, width), but {tuple(x.shape)} came. Give the "
            "model an input of that shape, or leave autoattack out of the methods."
        )
    with _random_numbers_kept(), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        attacker = package.AutoAttack(
            _Single(model) if len(x) == 1 else model,
            norm=NORMS[threat.norm],
            eps=float(threat.eps),
            seed=seed,
            version="custom",
            attacks=["apgd-ce", *(["apgd-t", "fab-t"] if classes >= 4 else ["fab"]), "square"],
            device=x.device,
        )
        attacker.verbose = False
        attacker.apgd.n_restarts = attacker.apgd_targeted.n_restarts = attacker.fab.n_restarts = 1
        attacker.apgd_targeted.n_target_classes = attacker.fab.n_target_classes = min(TARGETS, classes - 1)
        found, predicted = attacker.run_standard_evaluation(x.detach(), y, batch_size=len(x))
    found = threat.project(x, found.detach())
    return torch.where((predicted != y).view(-1, *[1] * (x.dim() - 1)), found, torch.nan)


class _Single(nn.Module):
    """The network with the batch dimension kept, which the package squeezes away for a single image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x if x.dim() == 4 else x.unsqueeze(0))


def _import() -> Any:
    try:
        import pyautoattack
    except ImportError as error:
        raise InputError(
            f"The method autoattack needs the package pyautoattack, which cannot be imported here ({error}). Install "
            "it with `pip install 'certprune[attacks]'`, or leave that method out."
        ) from error
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    return pyautoattack


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    import numpy

    ours, theirs = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(ours)
            numpy.random.set_state(theirs)
