"""The smoothed classifier: the class that a network most probably gives under Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from certifiers.checks import check_model, count_classes, device_of
from certifiers.errors import InputError
from certifiers.smoothing.bounds import (
    certified_radius,
    check_confidence,
    check_samples,
    check_sigma,
    lower_confidence_bound,
    radius_text,
)
from certifiers.smoothing.noise import fill_gaussian, stream
from certifiers.smoothing.sampling import class_counts
from certifiers.threat import check_images


@dataclass(frozen=True)
class Certificate:
    """What sampling showed at one input.

    With probability at least 1 - alpha over the noise, the smoothed classifier's class is `prediction` at every point
    nearer than `radius` (l2, pixels). `prediction` is None where it abstains, and the radius then 0. `selection`
    and `counts` say how many of the n0 and of the n samples each class won (ties are nobody's); `p_lower` is the
    confidence bound from which the radius follows.
    """

    prediction: int | None
    radius: float
    p_lower: float
    selection: tuple[int, ...]
    counts: tuple[int, ...]

    def __str__(self) -> str:
        if self.prediction is None:
            return "abstained"
        return f"class {self.prediction} within l2 radius {radius_text(self.radius)}"


@dataclass(frozen=True, eq=False)
class SmoothedClassifier:
    """g(x) = the class that `model` gives to x + N(0, sigma^2 I) with the largest probability.

    Cohen, Rosenfeld and Kolter 2019 (arXiv 1902.02918). `model` maps (batch, ...) in pixel units to logits (batch,
    num_classes); it must be in eval mode with plain weights whenever it is asked. `sigma` is in pixel units: noise is
    added before the model's own normalisation, and never clipped.

    Raises InputError for a sigma that is not positive, fewer than 2 classes, and a model that cannot be certified.
    """

    model: nn.Module
    num_classes: int
    sigma: float

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        classes = self.num_classes
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise InputError(f"A classifier has 2 classes or more, but num_classes is {classes!r}.")
        check_model(self.model)

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> list[Certificate]:
        """One certificate per input, in the order of `x` (batch, ...): procedure CERTIFY of the paper.

        `n0` samples select the class, `n` others estimate its probability; alpha is the probability, for each input
        by itself, that its certificate is wrong. The noise of an input depends on `seed` and its number in `indices`
        (its place in `x` if None) alone.

        Raises InputError for numbers out of range, inputs outside [0, 1], and a model that does not fit them, is in
        train mode or gives logits that are not finite.
        """
        check_samples(n0, "n0")
        check_samples(n)
        check_confidence(alpha)
        x, numbers = self._checked(x, indices, batch_size)
        return [self._certificate(row, n0, n, alpha, seed, i, batch_size) for row, i in zip(x, numbers, strict=True)]

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
            most, second = self._counts(row, n, seed, index, "predict", batch_size).topk(2)
            wins, losses = int(most[0]), int(most[1])
            decided = wins > 0 and binomtest(wins, wins + losses).pvalue <= alpha
            predictions.append(int(second[0]) if decided else None)
        return predictions

    def _certificate(
        self, x: Tensor, n0: int, n: int, alpha: float, seed: int, index: int, batch_size: int | None
    ) -> Certificate:
        selection = self._counts(x, n0, seed, index, "select", batch_size)
        counts = self._counts(x, n, seed, index, "estimate", batch_size)
        chosen = int(selection.argmax())
        p_lower = lower_confidence_bound(int(counts[chosen]), n, alpha)
        radius = certified_radius(p_lower, self.sigma)
        return Certificate(
            prediction=chosen if radius > 0.0 else None,
            radius=radius,
            p_lower=p_lower,
            selection=tuple(selection.tolist()),
            counts=tuple(counts.tolist()),
        )

    def _counts(self, x: Tensor, n: int, seed: int, index: int, purpose: str, batch_size: int | None) -> Tensor:
        fill = partial(fill_gaussian, sigma=self.sigma, generator=stream(seed, index, purpose, x.device))
        return class_counts(self.model, x, fill, n, self.num_classes, batch_size)

    def _checked(self, x: Tensor, indices: Sequence[int] | None, batch_size: int | None) -> tuple[Tensor, list[int]]:
        """The inputs on the model's device and their numbers."""
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
        return x.to(device_of(self.model)), numbers
