"""The set of inputs a bound is about, in the form bound propagation uses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .operations import Interval, total


class Region(NamedTuple):
    """A box cut to [0, 1], and for l2 threats also the ball around ``x``: the inputs lie in both.

    ``box``: centre and radius, ``(batch, *shape)``. ``x``, ``eps``: the l2 ball's, or None; ``eps`` is one number or
    one for each sample, ``(batch, 1)``.
    """

    box: Interval
    x: Tensor | None = None
    eps: float | Tensor | None = None

    @staticmethod
    def of(x: Tensor, threat, account_for_rounding: bool = False) -> Region:
        """The region of inputs ``x`` (batch, *shape) under a threat model (LinfBall or L2Ball).

        With ``account_for_rounding`` it is larger by what rounding may take from the ends of the box and from eps.
        """
        box = Interval.between(*threat.box(x))
        eps = threat.eps.flatten(1) if isinstance(threat.eps, Tensor) and threat.eps.dim() else threat.eps
        if account_for_rounding:
            spare = 8 * torch.finfo(x.dtype).eps
            box, eps = Interval(box.centre, box.radius + spare * (1.0 + threat.eps)), eps * (1 + spare)
        return Region(box, x, eps) if threat.norm == "l2" else Region(box)

    def select(self, samples: Tensor) -> Region:
        """The regions of these samples (indices, repeats allowed)."""
        box = Interval(self.box.centre[samples], self.box.radius[samples])
        eps = self.eps[samples] if isinstance(self.eps, Tensor) and self.eps.dim() else self.eps
        return Region(box, None if self.x is None else self.x[samples], eps)

    def of_pixels(self, pixels: Tensor) -> Region:
        """The region seen from these pixels alone (flat places); sound for rows that are zero elsewhere."""
        centre, radius = (part.flatten(1)[:, pixels] for part in (self.box.centre, self.box.radius))
        return Region(Interval(centre, radius), None if self.x is None else self.x.flatten(1)[:, pixels], self.eps)

    def minimum(self, rows: Tensor) -> Tensor:
        """The least value of every linear row, ``(samples, rows, *shape)`` to ``(samples, rows)``.

        Exact over the box; over box and ball the better of the two minima, which is sound.
        """
        centre, radius = self.box.centre.unsqueeze(1), self.box.radius.unsqueeze(1)
        least = total(rows * centre - rows.abs() * radius)
        if self.x is None:
            return least
        # The square root's gradient is infinite at 0; a row of zeros has minimum 0 whatever the tiny shift.
        length = (total(rows.square()) + torch.finfo(rows.dtype).tiny).sqrt()
        return torch.maximum(least, total(rows * self.x.unsqueeze(1)) - self.eps * length)

    def minimiser(self, rows: Tensor) -> Tensor:
        """An input of the region where each linear row is least, ``(samples, rows, *shape)``.

        Exact over the box; with a ball the ball's own, cut to the box.
        """
        centre, radius = self.box.centre.unsqueeze(1), self.box.radius.unsqueeze(1)
        if self.x is None:
            return centre - radius * rows.sign()
        length = total(rows.square()).sqrt().clamp(min=torch.finfo(rows.dtype).tiny)
        eps = (self.eps / length).reshape(*length.shape, *[1] * (rows.dim() - 2))
        point = self.x.unsqueeze(1) - eps * rows
        return torch.minimum(torch.maximum(point, centre - radius), centre + radius)

    def deviation(self, rows: Tensor) -> Interval:
        """Bounds of ``rows . (input - box.centre)``: rows ``(samples or 1, rows, *shape)`` to ``(samples, rows)``."""
        reach = dot(rows.abs(), self.box.radius)
        if self.x is None:
            return Interval(torch.zeros_like(reach), reach)
        shift = dot(rows, self.x - self.box.centre)
        length = self.eps * (total(rows.square()) + torch.finfo(rows.dtype).tiny).sqrt()
        lower = torch.maximum(-reach, shift - length)
        return Interval.between(lower, torch.minimum(reach, shift + length).maximum(lower))


def dot(rows: Tensor, values: Tensor) -> Tensor:
    """``rows . values`` of every sample: rows ``(samples or 1, rows, *shape)``, values ``(samples, *shape)``."""
    rows, values = rows.flatten(2), values.flatten(1)
    if rows.shape[0] == 1:
        return values @ rows[0].T
    return (rows @ values.unsqueeze(2)).squeeze(2)
