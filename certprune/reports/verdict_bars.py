"""How each image was decided, as HTML: stacked bars, whose edges are the three accuracies, and the counts."""

from collections import Counter
from html import escape

from certifiers.verdict import Status
from certprune.reports.ledgers import LedgerView
from certprune.reports.read import RunView
from certprune.reports.rows import ordered


def verdicts(run: RunView) -> str:
    """Which method decided how many images: stacked bars at the main eps and the counts at every eps."""
    held = _held(run, run.main_eps)
    if not held:
        return ""
    methods = _methods(run)
    rows = [f"<div>{escape(name)}</div>{_bar(ledger, methods)}" for name, ledger in held]
    ticks = "".join(f'<span style="left:{at}%">{at}{" %" if at == 100 else ""}</span>' for at in (0, 25, 50, 75, 100))
    shown = sum((_counts(ledger) for _, ledger in held), Counter())
    legend = "".join(
        f'<li><span class="key {mark}" style="--c:var({colour})"></span>{escape(text)}</li>'
        for key, text, colour, mark in _kinds(methods)
        if shown[key]
    )
    return (
        f'<figure><div class="bars">{"".join(rows)}<div></div><div class="scale">{ticks}</div></div>'
        f'<ul class="legend">{legend}</ul>'
        f"<figcaption>How each image was decided at eps {run.main_eps:g}. The certified part ends at the certified "
        "accuracy, the undecided part at the attack accuracy, the part broken by the attack at the clean accuracy: "
        "the true robust accuracy lies between the first two."
        f"{_attack(held[0][1])}</figcaption></figure>" + _verdict_table(run, methods)
    )


def _attack(ledger: LedgerView) -> str:
    """How hard the attack tried, as far as the ledger says."""
    steps, restarts = (ledger.header.get(key) for key in ("attack_steps", "attack_restarts"))
    if not isinstance(steps, int) or not isinstance(restarts, int):
        return ""
    if steps == 0:
        return " No attack was made."
    again = "" if restarts == 1 else f" and {restarts} restarts"
    return f" The attack is projected gradient descent with {steps} steps{again}."


def _held(run: RunView, eps: float | None) -> list[tuple[str, LedgerView]]:
    """The labels and ledgers of the networks certified at ``eps``."""
    if eps is None:
        return []
    pairs = ((text, variant.ledger(eps)) for variant, text in ordered(run).values())
    return [(text, ledger) for text, ledger in pairs if ledger is not None]


def _methods(run: RunView) -> list[str]:
    """The methods that certified something, in the order of the recipe: cheapest first."""
    planned = list((run.config.get("certify") or {}).get("methods") or ())
    used = {
        verdict.method
        for variant in run.variants
        for ledger in variant.ledgers
        for verdict in ledger.verdicts
        if verdict.status is Status.certified
    }
    return [method for method in planned if method in used] + sorted(used - set(planned))


def _kinds(methods: list[str]) -> list[tuple[str, str, str, str]]:
    """(key, words, colour variable, extra class) of every way an image can end, in the order of the bars."""
    kinds = []
    for place, method in enumerate(methods):
        depth = min(place, 3)
        kinds.append((f"certified {method}", f"certified by {method}", f"--v{depth}", "deep" if depth > 1 else ""))
    kinds += [
        (status.value, words, "--open", "open")
        for status, words in ((Status.unknown, "undecided"), (Status.timeout, "timed out"))
    ]
    kinds.append((Status.falsified.value, "broken by the attack", "--broken", ""))
    kinds.append((Status.abstained.value, "abstained", "--wrong", "open"))
    kinds.append((Status.misclassified.value, "wrong when clean", "--wrong", ""))
    return kinds


def _counts(ledger: LedgerView) -> Counter:
    return Counter(
        f"certified {verdict.method}" if verdict.status is Status.certified else verdict.status.value
        for verdict in ledger.verdicts
    )


def _bar(ledger: LedgerView, methods: list[str]) -> str:
    counts, n = _counts(ledger), len(ledger.verdicts)
    parts = []
    for key, words, colour, mark in _kinds(methods):
        count = counts[key]
        if not count:
            continue
        inside = str(count) if count / n > 0.055 else ""
        parts.append(
            f'<span class="{mark}" style="--c:var({colour});flex:{count} 0 0" '
            f'title="{escape(f"{count} of {n} {words}", quote=True)}">{inside}</span>'
        )
    return f'<div class="bar">{"".join(parts)}</div>'


def _verdict_table(run: RunView, methods: list[str]) -> str:
    every = [(eps, name, _counts(ledger)) for eps in run.eps_grid for name, ledger in _held(run, eps)]
    total = sum((counts for *_, counts in every), Counter())
    kinds = [kind for kind in _kinds(methods) if total[kind[0]]]
    head = "".join(f'<th scope="col">{escape(words)}</th>' for _, words, _, _ in kinds)
    body = "".join(
        f'<tr><th scope="row" class="left">{escape(name)}</th><td>{eps:g}</td>'
        + "".join(f"<td>{counts[key]:,}</td>" for key, *_ in kinds)
        + f"<td>{counts.total():,}</td></tr>"
        for eps, name, counts in every
    )
    return (
        "<details><summary>The counts at every eps</summary>"
        '<div class="scroll"><table><thead><tr><th scope="col" class="left">Network</th><th scope="col">eps</th>'
        f'{head}<th scope="col">images</th></tr></thead><tbody>{body}</tbody></table></div></details>'
    )
