"""The smoothed classifier: the class that a network most probably gives under noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from certifiers.checks import check_model, count_classes, device_of
from certifiers.errors import InputError
from certifiers.smoothing.anytime import lower_sequence
from certifiers.smoothing.bounds import (
    certified_radius,
    check_confidence,
    check_samples,
    check_sigma,
    lower_confidence_bound,
    radius_text,
    snapping_slack,
)
from certifiers.smoothing.kinds import Kind, noise_kind
from certifiers.smoothing.noise import FILLS, SHARED, grid, snapped, stream
from certifiers.smoothing.sampling import Fill, class_counts, fastest_batch, suggested_batch
from certifiers.smoothing.shared import Stop, shared_counts, split_first_layer
from certifiers.smoothing.stopping import Stopping, looks
from certifiers.threat import check_images

WORTH_TIMING = 20_000  # samples: for fewer, the fastest batch size is not worth looking for


@dataclass(frozen=True)
class Certificate:
    """What sampling showed at one input.

    With probability at least 1 - alpha over the noise, the smoothed classifier's class is `prediction` at every point
    nearer than `radius` (in `norm`, pixels). `prediction` is None where it abstains, and the radius then 0.
    `selection` and `counts` say how many of the n0 and of the `samples` each class won (ties are nobody's); `p_lower`
    is the confidence bound from which the radius follows: certified_radius(p_lower, ...) less the classifier's slack.
    """

    prediction: int | None
    radius: float
    p_lower: float
    selection: tuple[int, ...]
    counts: tuple[int, ...]
    samples: int
    norm: str = "l2"

    def __str__(self) -> str:
        if self.prediction is None:
            return "abstained"
        return f"class {self.prediction} within {self.norm} radius {radius_text(self.radius)}"


@dataclass(frozen=True, eq=False)
class SmoothedClassifier:
    """g(x) = the class that `model` gives to x + noise with the largest probability, x and noise snapped to a grid.

    Cohen, Rosenfeld and Kolter 2019 (arXiv 1902.02918). `model` maps (batch, ...) in pixel units to logits (batch,
    num_classes); it must be in eval mode with plain weights whenever it is asked. `sigma`, the noise's standard
    deviation, is in pixel units: noise is added before the model's own normalisation, and never clipped.

    Input and noise lie on one grid, on which their sum is exact (:mod:`noise`): what `model` sees is a function of the
    exact sum, whatever the input, and does not depend on how a sum of floating point numbers is rounded. That snaps x
    by at most half a spacing in each number, and radii are smaller for it by :meth:`slack`.

    `noise`: "gaussian", which certifies l2 radii, or "uniform", in [-sqrt(3) sigma, sqrt(3) sigma] in each pixel,
    which certifies l1 radii (:mod:`kinds`).

    `shared_noise`: all inputs get the same noise, a function of the seed alone, so that it and the network's first
    layer are computed once for all of them (:mod:`shared`). Each certificate is as valid as with noise of its own, but
    those of different inputs then depend on each other: how many of them are wrong varies more, its mean is the same.

    Raises InputError for a sigma that is not positive, an unknown noise, fewer than 2 classes, and a model that cannot
    be certified.
    """

    model: nn.Module
    num_classes: int
    sigma: float
    noise: str = "gaussian"
    shared_noise: bool = False

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        noise_kind(self.noise)
        classes = self.num_classes
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise InputError(f"A classifier has 2 classes or more, but num_classes is {classes!r}.")
        check_model(self.model)

    @property
    def kind(self) -> Kind:
        """The theorem behind the noise: its norm and its radius."""
        return noise_kind(self.noise)

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        *,
        stopping: Stopping | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> list[Certificate]:
        """One certificate per input, in the order of `x` (batch, ...): procedure CERTIFY of the paper.

        `n0` samples select the class, `n` others estimate its probability; alpha is the probability, for each input
        by itself, that its certificate is wrong. With `stopping`, `n` is the most that are drawn, and the bound is one
        that holds whenever sampling stops (:mod:`anytime`) in place of Clopper and Pearson's. The noise of an input
        depends on `seed` and its number in `indices` (its place in `x` if None) alone, or, where noise is shared, on
        `seed` alone. `batch_size` (default: what is fastest in a short trial) does not change it.

        Raises InputError for numbers out of range, inputs outside [0, 1], and a model that does not fit them, is in
        train mode or gives logits that are not finite.
        """
        check_samples(n0, "n0")
        check_samples(n)
        check_confidence(alpha)
        x, numbers = self._checked(x, indices, batch_size)
        if not len(x):
            return []
        batch_size = batch_size or self.batch_size(x, n)
        slack = self.slack(x)
        sample = self._sample_shared if self.shared_noise else self._sample_each
        selections, _ = sample(x, [n0], seed, numbers, "select", batch_size)
        chosen = selections.argmax(1)

        def stop(counts: Tensor, samples: int, rows: Tensor) -> Sequence[bool]:
            won = counts.gather(1, chosen[rows, None])[:, 0].numpy()
            return stopping.enough(won, samples, n, alpha, self.kind, self.sigma, slack=slack).tolist()

        asked = [n] if stopping is None else looks(n)
        counts, samples = sample(x, asked, seed, numbers, "estimate", batch_size, None if stopping is None else stop)
        found = []
        for row in range(len(x)):
            won = int(counts[row, chosen[row]])
            if stopping is None:
                p_lower = lower_confidence_bound(won, n, alpha)
            else:
                p_lower = float(lower_sequence(won, samples[row], alpha))
            radius = certified_radius(p_lower, self.sigma, self.noise, slack)
            certificate = Certificate(
                prediction=int(chosen[row]) if radius > 0.0 else None,
                radius=radius,
                p_lower=p_lower,
                selection=tuple(selections[row].tolist()),
                counts=tuple(counts[row].tolist()),
                samples=samples[row],
                norm=self.kind.norm,
            )
            found.append(certificate)
        return found

    def predict(
        self,
        x: Tensor,
        n: int = 1000,
        alpha: float = 0.001,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> list[int | None]:
        """The class at each input, None where it abstains: procedure PREDICT of the paper.

        A class is returned if a two-sided binomial test rejects, at level `alpha`, that it and the runner-up are
        equally probable; it is then g(x) with probability at least 1 - alpha. Raises as :meth:`certify`.
        """
        from scipy.stats import binomtest

        check_samples(n)
        check_confidence(alpha)
        x, numbers = self._checked(x, indices, batch_size)
        predictions = []
        for row, index in zip(x, numbers, strict=True):
            fill = self._fill(seed, SHARED if self.shared_noise else index, "predict", x.device)
            most, second = class_counts(self.model, row, fill, n, self.num_classes, batch_size).topk(2)
            wins, losses = int(most[0]), int(most[1])
            decided = wins > 0 and binomtest(wins, wins + losses).pvalue <= alpha
            predictions.append(int(second[0]) if decided else None)
        return predictions

    def slack(self, x: Tensor) -> float:
        """What the grid takes off every radius of inputs such as x (batch, ...), in pixels: 1.3e-5 for 28x28 float32.

        At sigma 0.25, in l2; see :func:`~certifiers.smoothing.bounds.snapping_slack`. Raises as :meth:`certify`.
        """
        check_images(x)
        return snapping_slack(grid(self.sigma, x.dtype), math.prod(x.shape[1:]), self.kind.norm)

    def batch_size(self, x: Tensor, n: int) -> int:
        """The number of samples in a forward pass that is fastest for inputs such as x (batch, ...).

        By a short trial, if there are enough samples to make it worth while.
        """
        check_model(self.model)
        if len(x) * n < WORTH_TIMING:
            return suggested_batch(x[0])
        return fastest_batch(self.model, x[0].to(device_of(self.model)), n)

    def _fill(self, seed: int, index: int | str, purpose: str, device: torch.device) -> Fill:
        return partial(FILLS[self.noise], sigma=self.sigma, generator=stream(seed, index, purpose, device))

    def _sample_each(
        self,
        x: Tensor,
        asked: Sequence[int],
        seed: int,
        numbers: Sequence[int],
        purpose: str,
        batch_size: int | None,
        stop: Stop | None = None,
    ) -> tuple[Tensor, list[int]]:
        """The counts (inputs, classes) and numbers of samples, each input under noise of its own."""
        counts, samples = [], []
        for row, index in enumerate(numbers):
            fill = self._fill(seed, index, purpose, x.device)
            total, done = torch.zeros(self.num_classes, dtype=torch.int64), 0
            for look in asked:
                total += class_counts(self.model, x[row], fill, look - done, self.num_classes, batch_size)
                done = look
                if stop is not None and stop(total[None], done, torch.tensor([row]))[0]:
                    break
            counts.append(total)
            samples.append(done)
        return torch.stack(counts), samples

    def _sample_shared(
        self,
        x: Tensor,
        asked: Sequence[int],
        seed: int,
        numbers: Sequence[int],
        purpose: str,
        batch_size: int,
        stop: Stop | None = None,
    ) -> tuple[Tensor, list[int]]:
        """The same under noise that all inputs share."""
        split = split_first_layer(self.model, x)
        fill = self._fill(seed, SHARED, purpose, x.device)
        return shared_counts(split, x, fill, asked, self.num_classes, batch_size, stop)

    def _checked(self, x: Tensor, indices: Sequence[int] | None, batch_size: int | None) -> tuple[Tensor, list[int]]:
        """The inputs, snapped to the grid and on the model's device, and their numbers."""
        check_model(self.model)
        check_images(x)
        numbers = list(range(len(x))) if indices is None else [int(index) for index in indices]
        if len(numbers) != len(x):
            raise InputError(f"Each input needs one number, but {len(x)} inputs came with {len(numbers)} indices.")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"The batch size must be 1 or more, not {batch_size}.")
        if len(x):
            found = count_classes(self.model, x)
            if found != self.num_classes:
                raise InputError(f"The model gives {found} logits, but num_classes is {self.num_classes}.")
        return snapped(x.to(device_of(self.model)), grid(self.sigma, x.dtype)), numbers
