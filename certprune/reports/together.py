"""What all ledgers about one network prove together, whichever method, verifier or time limit they are of.

An image is certified at an eps if any ledger has it certified at that eps or a larger one, and broken if any knows a
wrong prediction at that eps or a smaller one; no image is both, for ledgers that contradict each other are not read
(``ledgers.read_ledgers``). Which images count is settled without regard to how they came out: all that some ledger at
this very eps, or some ledger of radii that looks at least so far, has a line about.
"""

from dataclasses import replace

from certifiers.verdict import Status, Verdict
from certprune.reports.ledgers import LedgerView, RadiusView, same_eps
from certprune.reports.read import RunView, Variant
from certprune.reports.rows import Row, network_rows

OPEN = (Status.timeout, Status.unknown)


def ledger_together(variant: Variant, eps: float) -> LedgerView | None:
    """One verdict for each image at ``eps`` from all the network's ledgers; None where none is about that eps.

    Ledgers about other weights, images or norms than the recipe's own ledger (or the first, if it has none) are left
    out. The header's method is that of every ledger that was used, in words; the times are of the deciding ledger.
    """
    at_eps = [ledger for ledger in (*variant.ledgers, *variant.others) if same_eps(ledger.eps, eps)]
    if not at_eps:
        return None
    main = variant.ledger(eps) or at_eps[0]
    ledgers = [ledger for ledger in (*variant.ledgers, *variant.others) if _alike(ledger, main)]
    radii = [view for view in variant.radii if _alike(view, main)]
    here = [ledger for ledger in ledgers if same_eps(ledger.eps, eps)]
    verdicts: dict[int, Verdict] = {}
    for view in radii:
        if view.largest >= eps:
            verdicts.update({row.index: _open(row, eps, view) for row in view.rows})
    # Of what stays open, the recipe's own verdict is shown.
    for ledger in (*(other for other in here if other is not main), main):
        verdicts.update({verdict.index: verdict for verdict in ledger.verdicts})
    for view in (*here, *ledgers, *radii):
        _settle(verdicts, view, eps)
    ways = dict.fromkeys(ledger.way for ledger in (main, *here))
    ways |= dict.fromkeys(f"radii by {view.method}" for view in radii)
    header = {**main.header, "method": " · ".join(ways)}
    return LedgerView(main.path, header, [verdicts[index] for index in sorted(verdicts)])


def together_rows(run: RunView) -> dict[float, list[Row]]:
    """By eps, a row for each network whose ledgers together prove more than its own by the recipe's methods."""
    every = {ledger.eps for variant in run.variants for ledger in (*variant.ledgers, *variant.others)}
    found = {}
    for eps in sorted(every):
        views = {variant.name: ledger_together(variant, eps) for variant in run.variants}
        more = {variant.name for variant in run.variants if _more(variant, views[variant.name], eps)}
        rows = network_rows(run, lambda variant, views=views, more=more: [views[variant.name]] * (variant.name in more))
        found |= {eps: rows} if rows else {}
    return found


def _more(variant: Variant, view: LedgerView | None, eps: float) -> bool:
    own = variant.ledger(eps)
    return view is not None and (own is None or own.summary != view.summary)


def _alike(one: LedgerView | RadiusView, other: LedgerView) -> bool:
    return (one.model, one.images, one.norm) == (other.model, other.images, other.norm)


def _settle(verdicts: dict[int, Verdict], view: LedgerView | RadiusView, eps: float) -> None:
    """Take in what ``view`` decides of the images that are open still."""
    claims, refutations = view.claims(), view.refutations()
    rows = view.verdicts if isinstance(view, LedgerView) else view.rows
    methods = {row.index: row.method for row in rows}
    for index, verdict in verdicts.items():
        if verdict.status not in OPEN:
            continue
        if claims.get(index, -1.0) >= eps:
            verdicts[index] = replace(verdict, status=Status.certified, method=methods[index], margin=None)
        elif index in refutations and refutations[index] <= eps:
            method = methods[index] if isinstance(view, LedgerView) else "attack"
            verdicts[index] = replace(verdict, status=Status.falsified, method=method, margin=None)


def _open(row, eps: float, view: RadiusView) -> Verdict:
    """An image of a ledger of radii, as one that is undecided at ``eps`` (wrong ones stay wrong)."""
    status = row.status if row.status is Status.misclassified else Status.unknown
    method = "clean" if row.status is Status.misclassified else row.method
    return Verdict(row.index, row.label, row.prediction, status, eps, view.norm, method, None, row.seconds)
