"""``certify``, ``curve``, ``table``, ``compare`` and ``report``: verdicts, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from certifiers.errors import InputError
from certprune.cli.app import app, console
from certprune.cli.options import Countdown, check_external, check_limits, chosen_images, chosen_radius, chosen_variants
from certprune.cli.radii import certify_radii, say_cut_short
from certprune.cli.sessions import Session, session


@app.command()
def certify(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. runs/demo.")],
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Repeat to try several, cheapest first. Default: the recipe's."),
    ] = None,
    eps: Annotated[
        list[str] | None,
        typer.Option(metavar="EPS", help="In pixel units, 0.1 or 2/255; repeat for several. Default: the recipe's."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Repeat for several; 'pretrain' too. Default: the recipe's variants."),
    ] = None,
    network: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A network that certprune compact wrote, instead; repeat for several."),
    ] = None,
    index: Annotated[str | None, typer.Option(metavar="A:B", help="Images A to B - 1 of the split.")] = None,
    count: Annotated[int | None, typer.Option(help="The first so many images of the split.")] = None,
    input_seconds: Annotated[float | None, typer.Option(help="Time for each image; then it is a timeout.")] = None,
    run_seconds: Annotated[
        float | None, typer.Option(help="Time for the whole command; what is left, the same command goes on with.")
    ] = None,
    radius: Annotated[
        bool, typer.Option("--radius", help="Find the largest eps certified for each image, up to --eps.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="How near --radius gets, in pixel units. Default: a hundredth of --eps.")
    ] = None,
    external: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Ask this verifier about what stays undecided: {onnx}, {vnnlib}, {timeout}, {result} are filled in.",
        ),
    ] = None,
    external_timeout: Annotated[
        float, typer.Option(help="Seconds the external verifier has for each image; more is ended by force.")
    ] = 60.0,
) -> None:
    """Decide images of a run's networks, into its ledgers. Skips what is decided, goes on after a cut."""
    from certprune.asked import asked_images
    from certprune.runs import open_run
    from certprune.subjects import chosen_networks

    work = open_run(folder)
    names = chosen_networks(chosen_variants(work.recipe, variant, folder), network, variant)
    radii = [chosen_radius(text) for text in eps or ()]
    numbers = chosen_images(index, count)
    _check_methods(method)
    check_limits(radius, tolerance, input_seconds=input_seconds, run_seconds=run_seconds)
    if radius:
        return certify_radii(work, names, method, radii, tolerance, numbers, run_seconds)
    radii = radii or list(work.recipe.eps_grid)
    if not radii:
        raise InputError("Neither the recipe nor the command says at which eps to certify. Give --eps, e.g. --eps 0.1.")
    if external is not None:
        check_external(external, external_timeout)
    options = {"methods": method, "indices": numbers, "input_seconds": input_seconds}
    asked = None if external is None else (external, external_timeout)
    with session(work) as here:
        ledgers, troubles = _certified(here, names, radii, Countdown(run_seconds), options, asked)
        wanted = asked_images(work, here.data, numbers, work.recipe.certify.count).numbers
    for path in ledgers:
        _say(path, wanted)
    for trouble in troubles:
        here.screen.print(f"[yellow]External verifier:[/yellow] {trouble}", soft_wrap=True)


def _certified(
    here: Session,
    names: Sequence[Any],
    radii: Sequence[float],
    time_left: Countdown,
    options: dict[str, Any],
    external: tuple[str, float] | None,
) -> tuple[list[Path], list[str]]:
    """The ledgers of these networks at each eps, of an external verifier (its command and time) too; its troubles."""
    from rich.markup import escape

    from certprune.certifying import certify_network

    ledgers, troubles = [], []
    place = {"progress": here.progress, "indices": options["indices"]}
    for name in names:
        for eps in radii:
            limits = {**options, **place, "run_seconds": time_left()}
            ledgers.append(certify_network(here.work, name, eps, here.data, here.device, **limits))
            if external is not None:
                from certprune.external import external_network

                path, said = external_network(here.work, name, ledgers[-1], here.data, *external, **place)
                ledgers.append(path)
                troubles += [escape(f"{path.name}, {trouble}") for trouble in said]
    return ledgers, troubles


@app.command()
def curve(
    ledgers: Annotated[list[str], typer.Argument(metavar="LEDGER...", help="Ledgers, or logs of smoothing papers.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture to write: .png, .svg or .pdf.")],
    norm: Annotated[
        str | None, typer.Option(help="Show radii by smoothing as what they imply in this norm: linf, l2 or l1.")
    ] = None,
) -> None:
    """Draw certified accuracy against eps, of one or more ledgers. Writes the figures beside it as CSV."""
    from certprune.reports import write_curves

    if norm not in (None, "linf", "l2", "l1"):
        raise InputError(f"--norm must be linf, l2 or l1, but {norm!r} came.")
    for path in write_curves(ledgers, out, norm):
        console().print(f"Wrote {path}", soft_wrap=True)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or more run folders.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to write the page.")] = None,
) -> None:
    """Write one self-contained HTML page: tables, curves, provenance."""
    from certprune.reports import write_report

    console().print(f"Report: {write_report(folders, out)}", soft_wrap=True)


@app.command()
def table(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs of one or more recipes, with one or more seeds each.")
    ],
    eps: Annotated[str | None, typer.Option(help="Which eps to show. Default: the recipe's own.")] = None,
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Certified accuracy",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A Markdown file; CSVs and pictures go beside it.")
    ] = None,
    unstable: Annotated[
        int, typer.Option(min=0, metavar="N", help="Count unstable units around so many images, for -o; 0: do not.")
    ] = 100,
    note: Annotated[str, typer.Option(help="A paragraph under the page's heading, say what was asked, and when.")] = "",
) -> None:
    """Networks by sparsity, means over seeds. With -o a page: paired tests, correlations, pictures, CSVs."""
    from certprune.provenance import command_line
    from certprune.reports import read_run, rich_table, sections_of, write_study

    runs = [read_run(folder) for folder in folders]
    known = (run.main_eps for run in runs if run.main_eps is not None)
    radius = next(known, None) if eps is None else chosen_radius(eps)
    sections = [] if radius is None else sections_of(runs, radius)
    if not sections:
        raise InputError(
            f"{folders[0]} has no network certified at {'any eps' if radius is None else f'eps {radius:g}'}. Certify "
            "first (certprune certify RUN), or, for radii by smoothing, use certprune compare."
        )
    for section in sections:
        console().print(rich_table(section.rows, f"{section.title}, eps {radius:g}; 95 % intervals in brackets"))
    if out is not None:
        counts = _unstable(sections, radius, unstable) if unstable else {}
        for path in write_study(runs, out, title, command_line(), radius, counts, note):
            console().print(f"Wrote {path}", soft_wrap=True)


def _unstable(sections: Sequence[Any], eps: float, images: int) -> dict[tuple[str, str], float]:
    """The mean number of unstable units by run folder and network, of those whose weights and images are here."""
    from certprune.cli.sessions import recipe_data
    from certprune.runs import open_run
    from certprune.unstable import unstable_in_run

    named: dict[Path, list[str]] = {}
    for net in (net for section in sections for row in section.rows for net in row.nets.values()):
        named.setdefault(net.run.folder, []).append(net.variant.name)
    found: dict[tuple[str, str], float] = {}
    data: dict[str, Any] = {}
    for folder, names in named.items():
        try:
            work = open_run(folder)
            key = f"{work.recipe.data!r} {work.recipe.seed}"
            data[key] = data.get(key) or recipe_data(work.recipe)
            counted = unstable_in_run(work, names, eps, data[key], images)
        except InputError as error:
            console().print(f"[yellow]Unstable units of {folder} are left out:[/yellow] {error}", soft_wrap=True)
            continue
        found |= {(str(folder), name): units.mean for name, units in counted.items()}
    return found


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs of one or more recipes, with one or more seeds each.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="A Markdown file; a CSV goes beside it.")],
    eps: Annotated[str | None, typer.Option(help="Which eps to show. Default: each recipe's own.")] = None,
    sparsity: Annotated[float, typer.Option(help="Where the summary compares scores with magnitude.")] = 0.99,
    budget: Annotated[str, typer.Option(help="The budget it compares them under.")] = "uniform",
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Objectives side by side",
) -> None:
    """Several recipes side by side, means over seeds. Dense and pruned, learned scores minus magnitude."""
    from certprune.provenance import command_line
    from certprune.pruning import BUDGETS
    from certprune.registry import look_up
    from certprune.reports import families_csv, families_of, families_page, read_run
    from certprune.storage import write_text

    look_up("budget", budget, BUDGETS)
    if out.suffix == ".csv":
        raise InputError(f"The page is Markdown and its CSV goes beside it, but {out} was asked for. Give a .md name.")
    found = families_of([read_run(folder) for folder in folders], None if eps is None else chosen_radius(eps))
    write_text(out, families_page(found, title, command_line(), sparsity, budget))
    write_text(out.with_suffix(".csv"), families_csv(found))
    for family in found:
        seeds = ", ".join(str(run.seed) for run in family.runs)
        left = f"; not there yet: {len(family.missing)}, see the page" if family.missing else ""
        console().print(f"{family.title}: seeds {seeds}{left}", soft_wrap=True)
    console().print(f"Page: {out}, {out.with_suffix('.csv')}", soft_wrap=True)


def _say(path: Path, wanted: range) -> None:
    """What a ledger sums up to, what it lacks of the images that were asked for, and which stage decided how much."""
    from certifiers.verdict import read_ledger, summarise
    from certprune.reports.ledgers import LedgerView
    from certprune.reports.stages import stage_table

    header, verdicts = read_ledger(path)
    if verdicts:
        console().print(f"{path}: {summarise(verdicts)}", soft_wrap=True)
    say_cut_short(path, (verdict.index for verdict in verdicts), wanted)
    if not verdicts:
        return
    console().print(stage_table(LedgerView(path, header, verdicts)))


def _check_methods(methods: list[str] | None) -> None:
    from certifiers.certification import METHODS
    from certprune.registry import look_up

    for method in methods or ():
        look_up("method", method, dict.fromkeys([*METHODS, "cascade"]))
