"""What stands behind the figures, as HTML: definitions, provenance, and the command that repeats the run."""

import itertools
import shlex
from collections.abc import Iterator
from html import escape
from typing import Any

import yaml

from certprune.reports.look import objective_label
from certprune.reports.read import RunView, Variant
from certprune.reports.rows import duration, ordered
from certprune.reports.splits import reuse, splits_of

METHODS = {
    "ibp": "interval bounds: each layer maps a box to the smallest box that holds its image",
    "crown-ibp": "one backward pass of linear bounds (CROWN) through intervals found by interval bounds",
    "crown": "backward linear bounds for every layer, the intermediate ones included",
    "alpha-crown": "CROWN with the slopes of its lower bounds optimised for each image",
    "exact": "complete search by branch and bound; what it finds is run through the network before it counts",
    "lirpa-alpha-crown": "the same by auto_LiRPA",
    "attack": "projected gradient descent alone, which proves nothing",
    "autoattack": "the ensemble of attacks AutoAttack, whose finds are run through the network before they count",
    "symbolic": "forward affine forms with error terms (symbolic intervals)",
}

CHOSEN = "Which weights are kept"
UNTOUCHED = " that are used for nothing else. No choice is made on the images that the tables report."

DEFINITIONS = (
    (
        "Clean accuracy",
        "The fraction of images that the network classifies correctly as they are.",
    ),
    (
        "Certified accuracy",
        "The fraction of images that are classified correctly and for which it is proven that no allowed change alters "
        "the class: a lower bound of every logit difference to another class is positive. Every image counts in the "
        "denominator; undecided ones count as not certified.",
    ),
    (
        "Attack accuracy",
        "The fraction classified correctly for which projected gradient descent found no allowed change that alters "
        "the class. The true robust accuracy lies between certified and attack accuracy.",
    ),
    (
        "Allowed changes",
        "Every pixel, in units of [0, 1], may move by at most eps (ℓ∞), or all pixels together by a Euclidean distance "
        "of at most eps (ℓ2). The set is cut to the valid range [0, 1], never to the range of the images at hand.",
    ),
    (
        "Order of methods",
        "Each image is tried by the attack first, then by the methods from the cheapest to the dearest, until one "
        "decides; that one is named in the ledger.",
    ),
    (
        "Intervals in a run",
        "95 % Wilson score intervals of a binomial proportion: what other images of the same kind would give for "
        "this very network. They say nothing about other training runs.",
    ),
    (
        "Intervals over seeds",
        "95 % Student t-intervals of the mean over independent training runs; shown only where several are given.",
    ),
    (
        "Differences",
        "Paired: over the images that both networks were certified on, an adjusted Wald interval (Bonett and Price "
        "2012); over seeds, a t-interval of the differences of each seed.",
    ),
    (
        CHOSEN,
        "Those of the epoch with the lowest loss, at the final eps and weights of the objective, on validation images",
    ),
    (
        "Sparsity",
        "The fraction of all prunable weights, over all layers together, that are zero for good.",
    ),
    (
        "Times",
        "Wall-clock seconds on the machine named in the provenance; training counts the epochs with their validation. "
        "Certifying time is the sum over images, the attack "
        "included; an image's share of a batch is the batch's time divided by its size.",
    ),
)

RADII = (
    "Largest certified eps",
    "Found for each image by bisection, and proven as it stands: the bounds were computed at that very eps. A "
    "certificate at an eps holds at every smaller one, for its allowed changes are among those of the larger.",
)

SMOOTHING = (
    (
        "Randomized smoothing",
        "The smoothed classifier answers the class that the network gives most probably when Gaussian noise of "
        "standard deviation sigma, in units of [0, 1], is added to the image. The class that wins most of the first "
        "n0 noisy copies is the candidate; how many of n further copies it wins gives a lower bound of its "
        "probability p that holds with probability 1 - alpha (Clopper and Pearson). If it is above one half, no "
        "change of Euclidean length below sigma times the normal quantile of p alters the answer (Cohen et al. 2019); "
        "else the classifier abstains. Noise is not cut to [0, 1]; a tie between classes counts for none. Uniform "
        "noise of that standard deviation certifies ℓ1 radii instead, 2√3 sigma times what p is above one half (Lee et "
        "al. 2019; Yang et al. 2020). Where sampling may stop early, the bound is one that holds at every number of "
        "copies at once, by betting (Waudby-Smith and Ramdas 2024).",
    ),
    (
        "Certified at radius r",
        "The fraction of images for which the smoothed classifier answers the right class with a certified radius of "
        "at least r. Every image counts in the denominator. At r = 0 it is the smoothed classifier’s accuracy.",
    ),
)


def definitions(runs: list[RunView]) -> str:
    """How each figure was computed, the bound methods that these runs used among it."""
    variants = [variant for run in runs for variant in run.variants]
    used = {
        row.method
        for variant in variants
        for rows in ([v.verdicts for v in (*variant.ledgers, *variant.others)], [v.rows for v in variant.radii])
        for row in itertools.chain(*rows)
    }
    seen = reuse(splits_of(runs))
    chosen = f". {seen}" if seen else UNTOUCHED
    entries = [(term, text + chosen if term == CHOSEN else text) for term, text in DEFINITIONS]
    entries += [(f"Method {name}", f"{text}.") for name, text in METHODS.items() if name in used]
    if any(variant.radii for variant in variants):
        entries.append(RADII)
    if any(variant.smoothed for variant in variants):
        entries += SMOOTHING
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text[0].upper() + text[1:])}</dd>" for term, text in entries)
    return f"<dl>{items}</dl>"


def provenance(run: RunView) -> str:
    """Versions, hardware, seed, commit and times; the networks' hashes and the recipe folded away."""
    facts = [("run folder", str(run.folder)), *_facts(run.provenance)]
    hashes = [
        (variant.name, model)
        for variant, _ in ordered(run).values()
        for model in sorted({ledger.model for ledger in _held(variant)})
    ]
    recipe = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return (
        f"{_list(facts)}{_times(run)}"
        + (_folded("The networks certified, by the SHA-256 of their weights", _list(hashes)) if hashes else "")
        + _folded("The whole recipe", f"<pre>{escape(recipe)}</pre>")
    )


def _held(variant: Variant) -> list:
    return [*variant.ledgers, *variant.others, *variant.radii, *variant.smoothed]


def _facts(record: dict) -> Iterator[tuple[str, str]]:
    """The provenance record on a few lines; what has lines of its own elsewhere is left out."""
    for key, value in record.items():
        name = key.replace("_", " ")
        if key in ("stages", "command") or value in ([], {}):
            continue
        if key == "resumed" and isinstance(value, list):
            times = "once" if len(value) == 1 else f"{len(value)} times"
            last = value[-1].get("time") if isinstance(value[-1], dict) else None
            yield name, times + (f", last at {last}" if last else "")
        elif isinstance(value, dict):
            yield name, ", ".join(f"{part} {_known(item)}" for part, item in value.items())
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value))
        else:
            yield name, _known(value)


def _known(value: Any) -> str:
    return "not known" if value is None else str(value)


def _list(facts: list[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in facts)
    return f'<dl class="facts">{items}</dl>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _times(run: RunView) -> str:
    rows = []
    for variant, text in ordered(run).values():
        for stage in variant.stages.values():
            what = text if stage.name == "pretrain" else f"{text}: {stage.name}"
            state = "" if stage.complete else " (not finished)"
            against = f" of {objective_label(stage.objective)}" if stage.objective and stage.epochs else ""
            rows.append((what, f"{stage.epochs} epochs{against}{state}", duration(stage.seconds)))
        for ledger in (*variant.ledgers, *variant.others):
            what = f"{text}: certify at eps {ledger.eps:g}" + (f", {ledger.way}" if ledger in variant.others else "")
            rows.append((what, f"{len(ledger.verdicts):,} images", duration(ledger.seconds)))
        for view in variant.radii:
            what = f"{text}: radii up to {view.largest:g}"
            rows.append((what, f"{len(view.rows):,} images", duration(view.seconds)))
        for view in variant.smoothed:
            what = f"{text}: smooth with sigma {view.sigma:g}"
            rows.append((what, f"{len(view.verdicts):,} images", duration(view.seconds)))
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row" class="left">{escape(what)}</th><td>{escape(much)}</td><td>{escape(took)}</td></tr>'
        for what, much, took in rows
    )
    return _folded(
        "Time of every stage",
        '<div class="scroll"><table><thead><tr><th scope="col" class="left">Stage</th><th scope="col">Work</th>'
        f'<th scope="col">Time</th></tr></thead><tbody>{body}</tbody></table></div>',
    )


def reproduce(run: RunView) -> str:
    """The command that made the run, and the one that repeats it from the recipe it kept."""
    command = run.provenance.get("command")
    made = f"<p>This run was made by</p><pre>{escape(str(command))}</pre>" if command else ""
    config = shlex.quote(str(run.folder / "config.yaml"))
    program = "python run.py" if str(command).startswith("python run.py ") else "certprune"
    again = f"{program} run {config} {shlex.quote(f'output=runs/{run.name}-again')}"
    return (
        f"{made}<p>To repeat it from the recipe kept in its folder:</p><pre>{escape(again)}</pre>"
        '<p class="note">On the same machine, with the same versions and number of threads, the weights come out the '
        "same to the bit; elsewhere, rounding may differ.</p>"
    )
