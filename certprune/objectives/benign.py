"""Ordinary training: the cross-entropy of the clean inputs."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Figures, Objective, clean_figures


class Benign(Objective):
    """``cross_entropy(model(x), y)``; no robustness is asked for."""

    name: Literal["benign"] = "benign"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        logits = model(x)
        return F.cross_entropy(logits, y), clean_figures(logits, y)
