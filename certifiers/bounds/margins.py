"""Margins and the losses built on them: what the rest of the world asks of bound propagation.

The margin of class j is ``logit[y] - logit[j]``; all positive means the prediction y cannot change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..threat import class_numbers
from .graph import Network, trace
from .interval import Intervals, propagate
from .linear import crown_intervals, elided_bounds, least_inputs, lower_bounds
from .region import Region
from .symbolic import Symbolic

METHODS = ("ibp", "crown-ibp", "crown", "symbolic")


def margin_lower_bounds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat,
    method: str = "crown-ibp",
    memory_mb: float = 512,
    classes: Tensor | None = None,
    account_for_rounding: bool = False,
) -> Tensor:
    """Lower bounds of every margin over all inputs the threat model allows.

    Guarantee: for every x' in the threat set (cut to [0, 1]) and every class j, in exact arithmetic,
    ``logit(x')[y] - logit(x')[j] >= result[j]``, up to the rounding of the computation; with
    ``account_for_rounding`` without exception. Differentiable in x, weights and mask scores.

    Args:
        model: any traceable ``nn.Module`` with inputs in [0, 1]; in training mode BatchNorm uses x's statistics.
        x: clean inputs ``(batch, *shape)``, pixels in [0, 1].
        y: labels ``(batch,)``, integers.
        threat: LinfBall or L2Ball.
        method: "ibp" (interval arithmetic), "crown-ibp" (one backward pass on interval boxes), "crown" (backward
            bounds for unstable units of every layer too), "symbolic" (symbolic intervals: one slope per unit).
        memory_mb: "crown" and "symbolic" work through units in chunks of about this many megabytes.
        classes: ``(batch, classes)`` bool, the margins to bound; None: all. What is not asked for takes no row.
        account_for_rounding: take from every bound what rounding may have added to it (rounding.py); not for
            "symbolic".

    Returns:
        ``(batch, classes)``; 0 in column y, -inf where ``classes`` is False.

    Raises:
        UnsupportedLayer: a layer whose bounds are not known.
        InputError: an unknown method, or labels that are no integers.
    """
    y = class_numbers(y)
    network, intervals = bounded(model, x, threat, method, memory_mb, account_for_rounding)
    return margins_of(method, network, intervals, y, memory_mb, classes)


def bounded(
    model: nn.Module,
    x: Tensor,
    threat,
    method: str = "crown-ibp",
    memory_mb: float = 512,
    account_for_rounding: bool = False,
) -> tuple[Network, Intervals]:
    """The network, and the boxes of its nodes that ``method`` makes margins from; see :func:`margin_lower_bounds`."""
    if method not in METHODS:
        raise InputError(f"method should be one of {', '.join(METHODS)}, but is '{method}'.")
    if account_for_rounding and method == "symbolic":
        raise InputError("Rounding is not accounted for by the method symbolic; take ibp, crown-ibp or crown.")
    network = trace(model, tuple(x.shape[1:])).bind(x if needs_clean_batch(model) else None)
    intervals = propagate(network, Region.of(x, threat, account_for_rounding), account_for_rounding)
    return network, crown_intervals(network, intervals, memory_mb) if method == "crown" else intervals


def margins_of(
    method: str,
    network: Network,
    intervals: Intervals,
    y: Tensor,
    memory_mb: float = 512,
    classes: Tensor | None = None,
) -> Tensor:
    """Margins from the boxes that :func:`bounded` gave, ``(batch, classes)``."""
    y = class_numbers(y)
    if method == "ibp":
        return only(interval_margins(network, intervals, y), y, classes)
    if method == "symbolic":
        return only(symbolic_margins(network, intervals, y, memory_mb), y, classes)
    return linear_margins(network, intervals, y, classes)


def least_margin_inputs(
    network: Network, intervals: Intervals, y: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For each margin of ``classes`` (batch, K) the input where its linear bound is least; nothing is claimed of it.

    Returns:
        inputs ``(margins, *shape)``, and of each the sample and the class.
    """
    y = class_numbers(y)
    rows, samples, wrong = chosen_rows(y, classes, intervals.region.box.centre)
    points = least_inputs(network, len(network.nodes) - 1, rows.unsqueeze(1), intervals, samples)
    return points.squeeze(1), samples, wrong


def interval_margins(network: Network, intervals: Intervals, y: Tensor) -> Tensor:
    """Margins by interval bounds, final affine layers merged, ``(batch, classes)``."""
    y = class_numbers(y)
    rows, others = margin_rows(network, y, intervals.region.box.centre)
    return _spread(elided_bounds(network, rows, intervals).lower, others, y)


def linear_margins(network: Network, intervals: Intervals, y: Tensor, classes: Tensor | None = None) -> Tensor:
    """Margins by one backward pass over the given boxes, ``(batch, classes)``; -inf where ``classes`` is False."""
    y = class_numbers(y)
    if classes is not None and (classes.sum() + len(y) < classes.numel()):
        rows, samples, wrong = chosen_rows(y, classes, intervals.region.box.centre)
        found = lower_bounds(network, len(network.nodes) - 1, rows.unsqueeze(1), intervals, samples)
        return spread_chosen(found.squeeze(1), samples, wrong, y, classes)
    rows, others = margin_rows(network, y, intervals.region.box.centre)
    return _spread(lower_bounds(network, len(network.nodes) - 1, rows, intervals), others, y)


def symbolic_margins(network: Network, intervals: Intervals, y: Tensor, memory_mb: float = 512) -> Tensor:
    """Margins by symbolic intervals, ``(batch, classes)``; of ``intervals`` only what is exact is used."""
    y = class_numbers(y)
    rows, others = margin_rows(network, y, intervals.region.box.centre)
    return _spread(Symbolic(network, intervals, memory_mb).lower_bounds(rows), others, y)


def margin_rows(network: Network, y: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The K-1 rows ``e_y - e_j``, ``(batch, K-1, K)``, and which class j each is about, ``(batch, K-1)``."""
    classes = network.nodes[-1].shape[0]
    others = torch.arange(classes - 1, device=y.device).unsqueeze(0)
    others = others + (others >= y.unsqueeze(1)).long()
    eye = torch.eye(classes, dtype=like.dtype, device=like.device)
    return eye[y].unsqueeze(1) - eye[others], others


def chosen_rows(y: Tensor, classes: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Only the rows ``e_y - e_j`` of ``classes`` (batch, K), ``(rows, K)``; which sample and class each is about."""
    samples, wrong = others_of(y, classes).nonzero(as_tuple=True)
    eye = torch.eye(classes.shape[1], dtype=like.dtype, device=like.device)
    return eye[y[samples]] - eye[wrong], samples, wrong


def spread_chosen(bounds: Tensor, samples: Tensor, wrong: Tensor, y: Tensor, classes: Tensor) -> Tensor:
    """One bound a row back to ``(batch, classes)``: -inf for what was not asked, 0 in column y."""
    found = bounds.new_full(classes.shape, -torch.inf).index_put((samples, wrong), bounds)
    return found.scatter(1, y.unsqueeze(1), 0.0)


def only(bounds: Tensor, y: Tensor, classes: Tensor | None) -> Tensor:
    """``bounds`` (batch, classes) with -inf where ``classes`` is False, the label's column aside."""
    if classes is None:
        return bounds
    return bounds.where(classes.scatter(1, y.unsqueeze(1), True), -torch.inf)


def others_of(y: Tensor, classes: Tensor) -> Tensor:
    """``classes`` (batch, K) without the labels themselves."""
    return classes.scatter(1, y.unsqueeze(1), False)


def _spread(bounds: Tensor, others: Tensor, y: Tensor) -> Tensor:
    return bounds.new_zeros(len(y), others.shape[1] + 1).scatter(1, others, bounds)


def worst_case_cross_entropy(margins: Tensor, y: Tensor) -> Tensor:
    """Upper bounds ``(batch,)`` of the cross-entropy where every margin is at least ``margins`` (batch, classes)."""
    return F.cross_entropy(-margins, class_numbers(y), reduction="none")


def fused_cross_entropy(model: nn.Module, x: Tensor, y: Tensor, threat) -> Tensor:
    """Upper bounds ``(batch,)`` of the cross-entropy over the threat set by CROWN-IBP with loss fusion.

    Guarantee: at least ``cross_entropy(model(x'), y)`` for every x' in the threat set. See :func:`fused_loss`.
    """
    network = trace(model, tuple(x.shape[1:])).bind(x if needs_clean_batch(model) else None)
    return fused_loss(network, propagate(network, Region.of(x, threat)), y)


def fused_loss(network: Network, intervals: Intervals, y: Tensor) -> Tensor:
    """CROWN-IBP of the *loss*, in one backward row instead of K-1 (Xu et al. 2020, arXiv 2002.12920).

    With m_j = logit[j] - logit[y] in [l_j, u_j] by interval bounds, exp is convex, so its chord bounds it:
    ``sum_j exp(m_j) <= sum_j slope_j (m_j - l_j) + exp(l_j)``, linear in the logits and so bounded by one row.
    Everything is divided by exp(M), M = max(0, max_j u_j), before it is computed, so that no logit overflows:
    ``loss = M + log(exp(-M) + sum / exp(M))``.

    Returns:
        ``(batch,)``, at least the cross-entropy at every input of the region, finite for finite bounds.
    """
    y = class_numbers(y)
    rows, _ = margin_rows(network, y, intervals.region.box.centre)
    box = elided_bounds(network, -rows, intervals)
    least, width = box.lower, 2 * box.radius
    # The loss does not depend on M, so neither does its gradient.
    shift = box.upper.amax(1, keepdim=True).clamp(min=0).detach()
    slope = torch.exp(box.upper - shift) * _chord(width)
    row = (slope.unsqueeze(2) * -rows).sum(1, keepdim=True)
    above = -lower_bounds(network, len(network.nodes) - 1, -row, intervals)
    terms = torch.exp(least - shift)
    fused = above + (terms - slope * least).sum(1, keepdim=True)
    # The sum is at least every term at its least; rounding must not push it below (or below zero).
    fused = torch.maximum(fused, terms.sum(1, keepdim=True))
    return (shift + torch.log(torch.exp(-shift) + fused)).squeeze(1)


def _chord(width: Tensor) -> Tensor:
    """``(1 - exp(-w)) / w``: the chord's slope over an interval of width w >= 0, relative to its upper end."""
    small = width < 1e-2
    # Each branch sees only widths it can take: an overflow in the other would still poison the gradient.
    wide, w = torch.where(small, 1.0, width), torch.where(small, width, 0.0)
    series = 1 - w * (1 / 2 - w * (1 / 6 - w * (1 / 24 - w / 120)))
    return torch.where(small, series, -torch.expm1(-wide) / wide)


def needs_clean_batch(model: nn.Module) -> bool:
    """Whether ``bind`` needs the clean inputs: some BatchNorm takes its statistics from them."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    return any(isinstance(m, norms) and (m.training or m.running_mean is None) for m in model.modules())
