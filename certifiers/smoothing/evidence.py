"""Whether the rows of a ledger of smoothing say what their own counts prove, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from certifiers.smoothing.anytime import lower_sequence
from certifiers.smoothing.bounds import certified_radius, lower_confidence_bounds
from certifiers.verdict import Status

if TYPE_CHECKING:
    from certifiers.smoothing.verdict import SmoothedVerdict

SLACK = 1e-6  # of the radius, and of sigma: what other releases of the libraries may round otherwise


def flawed(header: Mapping[str, Any], rows: Sequence[SmoothedVerdict]) -> Iterator[tuple[int, str]]:
    """The places of rows whose class, status or radius does not follow from their counts under this header, and why.

    Needs "n", "alpha" and "sigma" in the header, and "n0", "noise", "stopping", "slack" as far as they apply; without
    the first three, radii are not looked at. With early stopping any number of samples up to n is right: its bound
    holds whenever one stops. Where several classes won most often in the selection, each of them may be the one that
    was chosen.
    """
    good = []
    for place, row in enumerate(rows):
        why = _inconsistent(header, row)
        if why:
            yield place, why
        else:
            good.append((place, row))
    if not {"n", "alpha", "sigma"} <= header.keys() or not good:
        return
    proven = _radii(header, [(won, _samples(header, row)) for _, row in good for won in _chosen(row)])
    for place, row in good:
        radii = [proven[won, _samples(header, row)] for won in _chosen(row)]
        if not any(abs(row.radius - radius) <= SLACK * (radius + header["sigma"]) for radius in radii):
            yield place, f"it has the radius {row.radius}, but from its counts follows {radii[0]}"
        elif (row.radius > 0.0) is (row.status is Status.abstained):
            yield place, f"it is {row.status.value} with the radius {row.radius}"


def _inconsistent(header: Mapping[str, Any], row: SmoothedVerdict) -> str:
    """What does not fit together in one row, its radius aside; "" where nothing is wrong."""
    if row.prediction is None:
        status = Status.abstained
    else:
        status = Status.certified if row.prediction == row.label else Status.misclassified
    if row.status is not status:
        return f"it is {row.status.value} with prediction {row.prediction} and label {row.label}"
    if len(row.counts) != len(row.selection) or min((*row.counts, *row.selection), default=-1) < 0:
        return f"its counts are {row.counts}, its selection {row.selection}"
    n, samples = header.get("n"), _samples(header, row)
    if n is not None and not (samples == n or (header.get("stopping") is not None and 0 < samples <= n)):
        return f"it is of {samples} samples, the ledger of {n}"
    if samples is not None and sum(row.counts) > samples:
        return f"its counts sum up to {sum(row.counts)}, more than its {samples} samples"
    if sum(row.selection) > header.get("n0", sum(row.selection)):
        return f"its selection sums up to {sum(row.selection)}, more than n0, {header['n0']}"
    if row.prediction is not None:
        known = 0 <= row.prediction < len(row.selection)
        if not known or row.selection[row.prediction] < max(row.selection):
            return f"its prediction is {row.prediction}, which is not what won most often in its selection"
    return ""


def _samples(header: Mapping[str, Any], row: SmoothedVerdict) -> Any:
    return header.get("n") if row.samples is None else row.samples


def _chosen(row: SmoothedVerdict) -> list[int]:
    """How often the chosen class won; several numbers where an abstention leaves open which class that was."""
    if row.prediction is not None:
        return [row.counts[row.prediction]]
    most = max(row.selection)
    return [count for count, selected in zip(row.counts, row.selection, strict=True) if selected == most]


def _radii(header: Mapping[str, Any], counts: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """The radius that so many successes in so many samples prove, for each different pair of them."""
    pairs = sorted(set(counts))
    won, samples = (np.array(values) for values in zip(*pairs, strict=True))
    lower: NDArray[np.float64]
    if header.get("stopping") is None:
        lower = lower_confidence_bounds(won, header["n"], header["alpha"])
    else:
        lower = lower_sequence(won, samples, header["alpha"])
    how = header["sigma"], header.get("noise", "gaussian"), header.get("slack") or 0.0
    return {pair: certified_radius(float(p), *how) for pair, p in zip(pairs, lower, strict=True)}
