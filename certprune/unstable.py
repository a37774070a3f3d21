"""How many units bounds leave unstable: ReLUs whose input may be of either sign for some input of the threat set.

Where a unit is stable its ReLU is linear and every bound passes it without loss, so that the number says how hard a
network is to certify, whatever the method (Xiao et al. 2019, arXiv 1809.03008).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certifiers.bounds import Region, propagate, trace
from certifiers.bounds.graph import nonlinear_places
from certifiers.bounds.nonlinear import ReLU
from certifiers.threat import threat
from certprune.asked import asked_images
from certprune.runs import Run
from certprune.subjects import subject

BATCH = 100


@dataclass(frozen=True)
class UnstableUnits:
    """``mean`` of the ``units`` are unstable for an image, averaged over the images."""

    mean: float
    units: int


@torch.no_grad()
def unstable_units(model: nn.Module, x: Tensor, ball) -> UnstableUnits:
    """Units of ``model`` (plain, in eval mode) that interval arithmetic leaves unstable around images ``x``.

    ``x``: (batch, channels, height, width) in [0, 1]; ``ball``: a threat model, as :func:`certifiers.threat.threat`
    makes it. Raises InputError for a layer that has no bounds.
    """
    network = trace(model, tuple(x.shape[1:])).bind(None)
    places = [
        network.nodes[place].inputs[0]
        for place in nonlinear_places(network)
        if isinstance(network.operations[place], ReLU)
    ]
    count, units = 0, 0
    for part in x.split(BATCH):
        boxes = propagate(network, Region.of(part, ball)).boxes
        held = [boxes[place] for place in places]
        count += sum(int(((box.lower < 0) & (box.upper > 0)).sum()) for box in held)
        units = sum(box.centre[0].numel() for box in held)
    return UnstableUnits(count / len(x), units)


def unstable_in_run(run: Run, names: Sequence[str], eps: float, data, images: int) -> dict[str, UnstableUnits]:
    """The same for networks of a run, over the first ``images`` of those that its recipe certifies."""
    asked = asked_images(run, data, None, min(images, run.recipe.certify.count or images))
    ball = threat(run.recipe.norm, eps)
    return {name: unstable_units(subject(run, name).model, asked.x, ball) for name in names}
