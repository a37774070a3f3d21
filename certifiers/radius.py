"""The largest eps that can be certified for each input, so that one pass gives the whole curve of certified accuracy.

Each method bisects, all inputs of a batch at once, each at an eps of its own; it begins where the cheaper one before
it ended. An attack that bisects first says where to stop looking. Nothing rests on certificates being monotone in eps:
the reported radius is an eps at which the bounds themselves were computed and all positive. A certificate at an eps
holds at every smaller one, for its threat set holds theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.attack import attack
from certifiers.cascade import Contradiction
from certifiers.checks import check_logits, check_model, count_classes, device_of
from certifiers.errors import InputError
from certifiers.methods import METHODS, method_names
from certifiers.resuming import check_predictions, decide_in_batches, decided_before, input_numbers
from certifiers.threat import Threat, check_images, check_labels, threat
from certifiers.verdict import ImageLedger, Status

KIND = "radius"  # the "kind" in the header of such a ledger
RADIUS_METHODS = ("ibp", "crown-ibp", "crown", "symbolic", "alpha-crown")  # those that take an eps for each input
USUAL = ("ibp", "crown-ibp", "crown")


@dataclass(frozen=True)
class RadiusVerdict:
    """The largest eps found to be certifiable for one input of a data set.

    `status` is certified (right, and certified at `radius` > 0), unknown (right, but certified at no eps that was
    tried; radius 0) or misclassified (radius 0). `broken` is the smallest eps that was tried at which the attack found
    a counterexample, or None. The truth lies between the two. `method` certified at `radius` ("clean" if none did).
    """

    index: int
    label: int
    prediction: int
    status: Status
    radius: float
    broken: float | None
    method: str
    seconds: float


class RadiusLedger(ImageLedger[RadiusVerdict]):
    """The append-only file of radii of one model on one data set.

    Header: "model", "data", "split", "images", "norm", "method", "largest", "tolerance", "attack_steps" and
    "attack_restarts" as far as they apply, which must be the same to go on, and any notes.
    """

    row = RadiusVerdict
    kind = KIND
    identity = (
        "model", "data", "split", "images", "norm", "method", "largest", "tolerance", "attack_steps", "attack_restarts",
    )  # fmt: skip

    @classmethod
    def typed(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {
            **values,
            "index": int(values["index"]),
            "status": Status(values["status"]),
            "radius": float(values["radius"]),
            "broken": None if values["broken"] is None else float(values["broken"]),
        }

    @classmethod
    def flaws(cls, header: Mapping[str, Any], rows: Sequence[RadiusVerdict]) -> Iterator[tuple[int, str]]:
        yield from super().flaws(header, rows)
        most = header.get("largest", math.inf) * (1 + 1e-6)  # radii are rounded to the inputs' precision
        for place, row in enumerate(rows):
            right = row.prediction == row.label
            if row.status is not _status(right, row.radius) or (row.radius > 0 and not right):
                about = f"prediction {row.prediction}, label {row.label} and radius {row.radius}"
                yield place, f"it is {row.status.value} with {about}"
            if not 0 <= row.radius <= most:
                yield place, f"it has the radius {row.radius}, of at most {header.get('largest')}"
            if row.broken is not None and not row.broken >= row.radius:
                yield place, f"it has the radius {row.radius}, though a wrong prediction is known within {row.broken}"


def read_radius_ledger(path: str | Path) -> tuple[dict[str, Any], list[RadiusVerdict]]:
    """The header and rows of a ledger of radii, without changing it; InputError if it is none."""
    return RadiusLedger.read(path)


def certify_radii(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str = "linf",
    method: str | Sequence[str] = USUAL,
    *,
    largest: float,
    tolerance: float,
    attack_steps: int = 20,
    attack_restarts: int = 1,
    batch_size: int = 200,
    indices: Sequence[int] | None = None,
    ledger: RadiusLedger | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    seed: int = 0,
    run_seconds: float | None = None,
) -> list[RadiusVerdict]:
    """One row per input, in the order of `x`; without those that the end of `run_seconds` left out.

    Every radius is at most `largest`, and was certified as it stands. For methods whose certificates are monotone in
    eps, none of them certifies at `tolerance` above it (up to rounding of eps in the input's dtype).

    Args:
        model, x, y, batch_size, indices, on_batch, seed: as for :func:`certifiers.certification.certify`.
        norm: "linf" or "l2"; largest, tolerance: in pixel units.
        method: one or several of :data:`RADIUS_METHODS`, cheapest first.
        attack_steps: with 0, nothing is attacked, and bounds are held against the clean input only.

    Raises:
        InputError: what does not fit; the message says what to do.
        SoundnessError: a certifier claimed more than a concrete input allows. The ledger gets a line of it.
    """
    methods = method_names(method)
    _check_settings(methods, largest, tolerance, batch_size, run_seconds)
    threat(norm, largest)
    numbers = input_numbers(indices, len(x))
    check_model(model)
    check_images(x)
    if len(x) == 0:
        return []
    check_labels(y, len(x), count_classes(model, x))
    settings = {
        "norm": norm,
        "method": "+".join(methods),
        "largest": largest,
        "tolerance": tolerance,
        "attack_steps": attack_steps,
        "attack_restarts": attack_restarts,
    }
    labels = dict(zip(numbers, y.tolist(), strict=True))
    known = decided_before(ledger, model, settings, labels, claim=("norm",))
    check_predictions(ledger, model, x, numbers)
    device, end = device_of(model), time.monotonic() + (run_seconds or math.inf)
    search = _Search(model, norm, methods, largest, tolerance, attack_steps, attack_restarts, seed)

    def decide(rows: list[int]) -> list[RadiusVerdict]:
        return search.batch(x[rows].to(device), y[rows].long().to(device), [numbers[row] for row in rows])

    steps = {"late": lambda: time.monotonic() >= end, "ledger": ledger, "on_batch": on_batch}
    return decide_in_batches(decide, numbers, known, batch_size, **steps)


def _check_settings(
    methods: Sequence[str], largest: float, tolerance: float, batch_size: int, run_seconds: float | None
) -> None:
    for name in methods:
        if name not in RADIUS_METHODS:
            raise InputError(
                f"Radii are certified by {', '.join(RADIUS_METHODS)}, not by {name!r}. Choose among these."
            )
    if not (math.isfinite(largest) and 0 < tolerance <= largest):
        raise InputError(
            f"The largest eps must be a finite number and the tolerance one above 0 and not above it, but {largest} "
            f"and {tolerance} came."
        )
    if batch_size < 1:
        raise InputError(f"The batch size must be 1 or more, not {batch_size}.")
    if run_seconds is not None and not run_seconds > 0:
        raise InputError(f"run_seconds must be a number of seconds above 0, or None, not {run_seconds}.")


@dataclass(frozen=True)
class _Search:
    """What is the same for all batches."""

    model: nn.Module
    norm: str
    methods: tuple[str, ...]
    largest: float
    tolerance: float
    attack_steps: int
    attack_restarts: int
    seed: int

    def batch(self, x: Tensor, y: Tensor, numbers: Sequence[int]) -> list[RadiusVerdict]:
        begin = time.perf_counter()
        with torch.no_grad():
            logits = self.model(x.clone())  # a model may write into its input
        check_logits(logits, numbers)
        right = (logits.argmax(1) == y).nonzero().flatten()
        radii, broken = torch.zeros(len(x), dtype=x.dtype), torch.full((len(x),), math.inf, dtype=x.dtype)
        methods = ["clean"] * len(x)
        if len(right):
            names = [numbers[row] for row in right.tolist()]
            found = _Radii(self, x[right], y[right], logits[right], names)
            radii[right.cpu()], broken[right.cpu()] = found.radius.cpu(), found.broken.cpu()
            for row, method in zip(right.tolist(), found.method, strict=True):
                methods[row] = method
        seconds = (time.perf_counter() - begin) / len(x)
        good = set(right.tolist())
        return [
            RadiusVerdict(
                index=number,
                label=int(y[row]),
                prediction=int(logits[row].argmax()),
                status=_status(row in good, radii[row].item()),
                radius=radii[row].item(),
                broken=broken[row].item() if broken[row].isfinite() else None,
                method=methods[row],
                seconds=seconds,
            )
            for row, number in enumerate(numbers)
        ]

    def balls(self, eps: Tensor, like: Tensor) -> Threat:
        """The threat sets of inputs shaped like ``like``, each with its own eps (batch,)."""
        return threat(self.norm, eps.view(-1, *[1] * (like.dim() - 1)))


class _Radii:
    """The radii of inputs that are predicted right: ``radius``, ``broken`` (inf where nothing broke it), ``method``."""

    def __init__(self, search: _Search, x: Tensor, y: Tensor, logits: Tensor, numbers: Sequence[int]) -> None:
        self.search, self.x, self.y, self.numbers = search, x, y, numbers
        self.shown = logits.gather(1, y[:, None]) - logits
        self.rounding = 1e3 * torch.finfo(logits.dtype).eps * (1.0 + logits.abs().amax(1, keepdim=True))
        self.radius = x.new_zeros(len(x))
        self.bounds = torch.full_like(logits, -torch.inf)  # at the radius
        self.method = ["clean"] * len(x)
        self.broken = x.new_full((len(x),), math.inf)
        if search.attack_steps > 0:
            self._bisect(x.new_zeros(len(x)), self._unbroken)
        for name in search.methods:
            self._bisect(self.radius.clone(), lambda rows, eps, name=name: self._proven(name, rows, eps))
        self._check_by_attack()

    def _bisect(self, low: Tensor, holds: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Ask ``holds(rows, eps)`` until, for each row, it does at ``low`` and not at most a tolerance above.

        It is asked at the largest eps first where nothing is known to be broken there.
        """
        high = self.broken.clamp(max=self.search.largest)
        untried = self.broken.isinf() & (low < high)
        while True:
            rows = (untried | (high - low > self.search.tolerance)).nonzero().flatten()
            middle = low[rows] + (high[rows] - low[rows]) / 2
            eps = torch.where(untried[rows], high[rows], middle)
            if len(rows) == 0:
                return
            fine = holds(rows, eps)
            low[rows] = torch.where(fine, eps, low[rows])
            stuck = (eps <= low[rows]) & ~fine  # the dtype cannot tell the middle from the ends
            high[rows] = torch.where(fine & ~stuck, high[rows], torch.where(stuck, low[rows], eps))
            untried[rows] = False

    def _unbroken(self, rows: Tensor, eps: Tensor) -> Tensor:
        _, success = self._attack(rows, eps)
        self.broken[rows] = torch.where(success, torch.minimum(eps, self.broken[rows]), self.broken[rows])
        return ~success

    def _attack(self, rows: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        search = self.search
        return attack(
            search.model,
            self.x[rows],
            self.y[rows],
            search.balls(eps, self.x),
            search.attack_steps,
            search.attack_restarts,
            seed=search.seed,
            indices=[self.numbers[row] for row in rows.tolist()],
        )

    def _proven(self, name: str, rows: Tensor, eps: Tensor) -> Tensor:
        x, y = self.x[rows], self.y[rows]
        classes = torch.ones_like(self.shown[rows], dtype=torch.bool).scatter(1, y[:, None], False)
        found = METHODS[name](self.search.model, x, y, self.search.balls(eps, x), classes, None)
        bounds = found if isinstance(found, Tensor) else found.bounds
        bounds = bounds.where(bounds.isfinite(), -torch.inf)
        self._check(name, rows, bounds, eps)
        # As in the cascade: where rounding puts a bound above what was shown, the latter counts.
        fine = (torch.minimum(bounds, self.shown[rows]) > 0).scatter(1, y[:, None], True).all(1)
        better = rows[fine]
        self.radius[better], self.bounds[better] = eps[fine], bounds[fine]
        for row in better.tolist():
            self.method[row] = name
        return fine

    def _check_by_attack(self) -> None:
        """Attack every input at its radius, and hold the bounds found there against what the network shows."""
        rows = (self.radius > 0).nonzero().flatten()
        if self.search.attack_steps == 0 or len(rows) == 0:
            return
        x_adv, success = self._attack(rows, self.radius[rows])
        with torch.no_grad():
            logits = self.search.model(x_adv)
        self.shown[rows] = torch.minimum(self.shown[rows], logits.gather(1, self.y[rows, None]) - logits)
        for name in dict.fromkeys(self.method[row] for row in rows.tolist()):
            some = rows[[self.method[row] == name for row in rows.tolist()]]
            self._check(name, some, self.bounds[some], self.radius[some])
        self.broken[rows] = torch.where(success, torch.minimum(self.radius[rows], self.broken[rows]), self.broken[rows])
        # Again: where rounding puts a bound above what was shown, the latter counts, and nothing is certified.
        tied = ~(self.shown[rows] > 0).scatter(1, self.y[rows, None], True).all(1)
        for row in rows[tied].tolist():
            self.radius[row], self.method[row] = 0.0, "clean"

    def _check(self, name: str, rows: Tensor, bounds: Tensor, eps: Tensor) -> None:
        shown = self.shown[rows]
        over = (bounds > shown + self.rounding[rows]) & bounds.isfinite()
        over = over.scatter(1, self.y[rows, None], False)
        if not over.any():
            return
        line, wrong = over.nonzero()[0].tolist()
        number, radius = self.numbers[int(rows[line])], eps[line].item()
        claimed, seen = bounds[line, wrong].item(), shown[line, wrong].item()
        details = {"index": number, "class": wrong, "method": name, "claimed": claimed, "shown": seen, "eps": radius}
        raise Contradiction(
            f"The certifier {name} is unsound on this model: for input {number} (class {wrong}) it claims a margin of "
            f"at least {claimed:g} within {self.search.norm} {radius:g}, but an input that lies within has {seen:g}. "
            "None of its certificates for this model can be trusted; please report this with the model.",
            {**details, "norm": self.search.norm, "seed": self.search.seed},
        )


def _status(right: bool, radius: float) -> Status:
    if not right:
        return Status.misclassified
    return Status.certified if radius > 0 else Status.unknown
