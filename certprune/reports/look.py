"""How networks are named, ordered and drawn, the same in every table and chart.

Colour says the sparsity, the line style says the criterion, the marker says the budget, so that "the same sparsity,
chosen differently" shares a colour. The palette is Okabe and Ito's, darkened on white and lightened on black until
each colour stands out, and stays distinguishable under the common colour blindnesses.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

CRITERIA = {
    "score": "learned scores",
    "magnitude": "least magnitude",
    "random": "random mask",
    "joint": "scores and weights together",
    "snip": "SNIP",
    "taylor": "Taylor",
}
OBJECTIVES = {
    "ibp": "IBP",
    "crown_ibp": "CROWN-IBP",
    "mixtrain": "MixTrain",
    "adversarial": "adversarial",
    "trades": "TRADES",
    "free": "free adversarial",
    "gaussian": "Gaussian noise",
    "stability": "stability",
    "consistency": "consistency",
    "smoothadv": "SmoothAdv",
    "sabr": "SABR",
    "mtl_ibp": "MTL-IBP",
    "cc_ibp": "CC-IBP",
}
NORMS = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}
BUDGETS = {"erk": "ERK", "uniform": "uniform", "global": "global", "learned": "learned rates"}

# Slot 0 is the ink of networks that are not pruned.
LIGHT = ("#4a5160", "#0068a8", "#c2500a", "#00845f", "#a3478f", "#8a6d00", "#5b5bd6", "#007f8c")
DARK = ("#b4bcc9", "#5cb0ee", "#f59a5b", "#3fcf9f", "#e28fcf", "#dfc04a", "#a3a3ff", "#4fd0dc")
DASHES = {
    "score": (),
    "joint": (9, 3, 2, 3),
    "magnitude": (6, 4),
    "random": (1.5, 3.5),
    "snip": (4, 2),
    "taylor": (4, 2, 1, 2),
}
MARKERS = {"erk": "o", "uniform": "s"}


@dataclass(frozen=True)
class Style:
    """``slot`` indexes the palette, ``dash`` is an on-off pattern in points, ``marker`` is "o", "s" or "D"."""

    slot: int
    dash: tuple[float, ...]
    marker: str


@dataclass(frozen=True)
class Network:
    """What identifies a network to a reader; every field but the name may be unknown.

    ``objective``: the name of its own objective, where it was pruned or finetuned by another one than the recipe's.
    ``how``: its schedule, pattern and floor in words, where they are not the usual ones.
    """

    name: str
    criterion: str | None = None
    budget: str | None = None
    sparsity: float | None = None
    objective: str | None = None
    how: str = ""


def percent(fraction: float, digits: int = 1) -> str:
    """0.95 -> "95 %", 0.998 -> "99.8 %": at most ``digits`` digits, but more where it would round up to 100 %."""
    while fraction < 1 and digits < 9 and round(100 * fraction, digits) >= 100:
        digits += 1
    text = f"{100 * fraction:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + " %"


def label(network: Network, budgets: bool = False) -> str:
    """A human name: "learned scores, 99 %"; with ``budgets`` also the budget; else the network's own name."""
    if network.criterion is None or network.sparsity is None:
        return network.name
    return f"{chosen_by(network, budgets)}, {percent(network.sparsity, 2)}"


def chosen_by(network: Network, budgets: bool = False) -> str:
    """How the kept weights were chosen: "learned scores", with ``budgets`` "learned scores, ERK"; else the name."""
    if network.criterion is None:
        return network.name
    words = CRITERIA.get(network.criterion, network.criterion)
    if network.objective:
        words += f" ({objective_label(network.objective)})"
    if budgets and network.budget:
        words += f", {BUDGETS.get(network.budget, network.budget)}"
    return f"{words}, {network.how}" if network.how else words


def objective_label(name: str) -> str:
    """An objective's name as its paper writes it; one of the user's own stays as it is."""
    return OBJECTIVES.get(name, name)


def labels(networks: Iterable[Network]) -> list[str]:
    """Labels of networks shown together: the budget is told only where it differs, and no two labels are equal."""
    networks = list(networks)
    budgets = len({network.budget for network in networks if network.budget}) > 1
    texts = [label(network, budgets) for network in networks]
    return [network.name if texts.count(text) > 1 else text for network, text in zip(networks, texts, strict=True)]


def order(network: Network) -> tuple:
    """Sort key: not pruned first, then by rising sparsity, then criterion (learned ones first) and budget."""
    criteria = list(DASHES)
    rank = criteria.index(network.criterion) if network.criterion in criteria else len(criteria)
    return (
        network.sparsity or 0.0,
        network.name != "pretrain",
        rank,
        network.objective or "",
        network.budget or "",
        network.how,
        network.name,
    )


def styles(networks: Iterable[Network]) -> list[Style]:
    """One style each; a style that is taken already moves on to the next free colour that says no sparsity."""
    networks = list(networks)
    pruned = sorted({network.sparsity for network in networks if network.sparsity})
    found: list[Style] = []
    for network in networks:
        slot = 1 + pruned.index(network.sparsity) if network.sparsity else 0
        dash = (2, 3) if network.name == "pretrain" else DASHES.get(network.criterion, ())
        marker = MARKERS.get(network.budget, "D" if network.sparsity else "o")
        while Style(slot % len(LIGHT), dash, marker) in found and slot < 2 * len(LIGHT):
            slot = max(slot + 1, 1 + len(pruned))
        found.append(Style(slot % len(LIGHT), dash, marker))
    return found


def spread(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions as little as can be (least squares) so that neighbours are ``gap`` apart in [low, high].

    Pool-adjacent-violators on position minus rank times gap: labels that would overlap move as one block.
    """
    ranked = sorted(range(len(positions)), key=lambda index: positions[index])
    blocks: list[list[float]] = []  # [sum, count] of positions less their rank's share of gaps
    for rank, index in enumerate(ranked):
        blocks.append([positions[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    bases = [total / count for total, count in blocks for _ in range(count)]
    room = high - (len(positions) - 1) * gap
    placed = list(positions)
    for rank, (index, base) in enumerate(zip(ranked, bases, strict=True)):
        placed[index] = max(min(base, room), low) + rank * gap
    return placed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about ``count`` of them."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= 0.999 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]
