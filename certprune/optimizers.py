"""The optimizers of a stage, each with its parameters and learning rate, driven as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certprune.stage_settings import Optimizer


@dataclass(frozen=True)
class Group:
    """Parameters, and how they are trained."""

    parameters: Sequence[nn.Parameter]
    settings: Optimizer


class Optimizers:
    """One optimizer for each group; what the epoch loop and its checkpoints need of them."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups
        self.each = [_optimizer(group) for group in groups]

    def set_rate(self, factor: float) -> None:
        """Set each learning rate to `factor` times the group's own."""
        for group, optimizer in zip(self.groups, self.each, strict=True):
            for part in optimizer.param_groups:
                part["lr"] = group.settings.lr * factor

    @property
    def rate(self) -> float:
        """The present learning rate of the first group."""
        return self.each[0].param_groups[0]["lr"]

    def zero_grad(self) -> None:
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def norms(self) -> list[Tensor]:
        """The norm of each group's whole gradient."""
        grads = [[p.grad for p in group.parameters if p.grad is not None] for group in self.groups]
        return [torch.nn.utils.get_total_norm(found) for found in grads]

    def clip(self, limit: float, norms: Sequence[Tensor]) -> None:
        """Scale each group's gradient down to the norm `limit`; `norms` are theirs now."""
        for group, norm in zip(self.groups, norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(group.parameters, limit, norm)

    def step(self) -> None:
        for optimizer in self.each:
            optimizer.step()

    def forget(self) -> None:
        """Drop what is remembered of earlier steps: momenta and the like."""
        for optimizer in self.each:
            optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that goes on in the next step; of one group, its optimizer's own."""
        states = [optimizer.state_dict() for optimizer in self.each]
        return states[0] if len(states) == 1 else {"each": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = [state] if len(self.each) == 1 else state["each"]
        for optimizer, found in zip(self.each, states, strict=True):
            optimizer.load_state_dict(found)


def _optimizer(group: Group) -> torch.optim.Optimizer:
    chosen, parameters = group.settings, group.parameters
    if chosen.name == "adam":
        return torch.optim.AdamW(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=chosen.lr,
        momentum=chosen.momentum,
        weight_decay=chosen.weight_decay,
        nesterov=chosen.momentum > 0,
    )
