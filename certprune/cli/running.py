"""``run`` and ``demo``: all stages of a recipe."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from certifiers.errors import InputError
from certprune.cli.app import app, console

STAGES = ("pretrain", "prune", "finetune", "certify", "report")


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A recipe (YAML), or the folder of a run to go on with.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="e.g. pretrain.epochs=2 variants.0.sparsity=0.9"),
    ] = None,
    stage: Annotated[str | None, typer.Option(help=f"Only this stage: {', '.join(STAGES)}.")] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write each epoch's figures to OUTPUT/tensorboard too.")
    ] = False,
) -> None:
    """Do all stages of a recipe. Goes on by itself where it was cut off."""
    if stage is not None and stage not in STAGES:
        raise InputError(f"--stage must be one of {', '.join(STAGES)}, but {stage!r} came.")
    recipe = Path(config) / "config.yaml" if Path(config).is_dir() else Path(config)
    changes = list(settings or ())
    if recipe.name == "config.yaml":  # the folder may have been moved: it is where it is
        changes.insert(0, f"output={json.dumps(str(recipe.parent))}")
    execute(recipe, changes, STAGES if stage is None else (stage,), tensorboard)


@app.command()
def demo(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
) -> None:
    """The main job, small, on embedded data. Pretrain, prune, finetune, certify, report."""
    recipe = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
    if not recipe.is_file():
        raise InputError(
            f"The demo's recipe is not here ({recipe}): recipes come with the source checkout, not with the "
            f"installed "
            "package. Get the repository and run `make demo` there, or write a recipe and use `certprune "
            "run`."
        )
    execute(recipe, list(settings or ()), STAGES)


def execute(path: Path, settings: list[str], stages: tuple[str, ...], tensorboard: bool = False) -> None:
    """Do ``stages`` of the recipe at ``path``, then show the table and where the report is."""
    from certprune.recipes import load_recipe

    recipe = load_recipe(path, settings)

    import torch

    from certprune.data import load_data
    from certprune.parallel import joined
    from certprune.progress import Progress, make_progress
    from certprune.provenance import command_line
    from certprune.runs import check_startable, locked, open_run, start_run
    from certprune.sharing import certify_together
    from certprune.stages import check_network, run_stages, use_machine

    if stages in (("certify",), ("report",)):
        open_run(recipe.output)  # there must be something to certify or report
    check_startable(recipe)
    device = use_machine(recipe)
    screen = console()
    progress = make_progress(screen)
    if tensorboard:
        from certprune.tensorboard import TensorBoard

        progress = TensorBoard(progress, Path(recipe.output) / "tensorboard")
    with contextlib.ExitStack() as held:
        with joined(device) as among:
            if not among.leads:  # the leader gets the data, makes the folder, writes and shows
                among.wait()
            data = load_data(
                recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options
            )
            check_network(recipe, data)
            if among.leads:
                held.enter_context(locked(recipe.output))
                work = start_run(recipe, command_line(), torch.get_num_threads(), str(device))
                among.wait()
            else:
                work, progress = open_run(recipe.output), Progress()
            try:
                run_stages(work, data, device, stages, progress)
                if "certify" in stages:
                    certify_together(work, data, device, among, progress)
            finally:
                progress.close()
        if among.leads and "report" in stages:
            finish(work, screen)


def finish(run: Any, screen: Any) -> None:
    """Write the report and the files beside it, print the table at the main eps and the report's path."""
    from certprune.reports import read_run, rich_table, smoothed_rows, summary_rows, write_report

    page = write_report(run.folder)
    eps = run.recipe.main_eps
    view = read_run(run.folder)
    rows = summary_rows(view, eps=eps)
    if rows:
        where = f"{rows[0].n:,} {run.recipe.data.name} {run.recipe.certify.split} images"
        screen.print()
        screen.print(rich_table(rows, title=f"{run.recipe.norm} eps {eps:g}, {where}"))
    for group in smoothed_rows(view)[:1]:
        first = group[0]
        noise = f"noise of sigma {first.sigma:g}, {first.samples:,} samples"
        screen.print()
        screen.print(rich_table(group, title=f"Certified % at {first.norm} radius r, {noise}, {first.n:,} images"))
    screen.print(f"Report: {page}", soft_wrap=True)
