"""``smooth``: certificates by randomized smoothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from certifiers.errors import InputError
from certprune.cli.app import app, console
from certprune.cli.options import chosen_images, chosen_variants


@app.command()
def smooth(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. runs/fashion_mnist_gaussian.")],
    sigma: Annotated[
        list[float] | None,
        typer.Option(help="Of the noise, in pixel units; repeat for several. Default: the recipe's."),
    ] = None,
    n: Annotated[int | None, typer.Option(help="Noisy samples to estimate with. Default: the recipe's, or 10000.")] = (
        None
    ),
    n0: Annotated[int | None, typer.Option(help="Noisy samples to select the class. Default: as above, or 100.")] = (
        None
    ),
    alpha: Annotated[
        float | None, typer.Option(help="How often a certificate may be wrong. Default: as above, or 0.001.")
    ] = None,
    noise: Annotated[
        str | None, typer.Option(help="gaussian (l2 radii) or uniform (l1 radii). Default: the recipe's, or gaussian.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Stop sampling an image when n samples would add no more to its radius.")
    ] = None,
    up_to: Annotated[float | None, typer.Option(help="... or its radius is this much.")] = None,
    decide: Annotated[
        list[float] | None, typer.Option(help="Stop when this radius is certified or out of reach; for several.")
    ] = None,
    shared_noise: Annotated[
        bool | None, typer.Option(help="The same noise for all images: faster, but certificates depend on each other.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Repeat for several; 'pretrain' too. Default: the recipe's variants."),
    ] = None,
    index: Annotated[str | None, typer.Option(metavar="A:B", help="Images A to B - 1 of the split.")] = None,
    count: Annotated[int | None, typer.Option(help="The first so many images of the split.")] = None,
) -> None:
    """Certify radii by randomized smoothing, into the run's ledgers; skips what is decided, goes on after a cut."""
    from certifiers.smoothing import read_smoothed_ledger
    from certifiers.smoothing.bounds import check_confidence, check_samples, check_sigma
    from certifiers.smoothing.kinds import noise_kind
    from certprune.config import SmoothingSettings
    from certprune.data import load_data
    from certprune.progress import make_progress
    from certprune.runs import locked, open_run
    from certprune.smoothing import radii_text, samples_text, smooth_network
    from certprune.stages import use_machine

    work = open_run(folder)
    recipe = work.recipe
    names = chosen_variants(recipe, variant, folder)
    usual = recipe.certify.smoothing or SmoothingSettings()
    sigmas = list(dict.fromkeys(sigma or ())) or [usual.sigma]
    if sigmas == [None]:
        raise InputError(
            "Neither the recipe nor the command says how much noise to smooth with. Give --sigma, e.g. --sigma 0.25."
        )
    given = {"n": n, "n0": n0, "alpha": alpha, "noise": noise, "shared_noise": shared_noise}
    given |= {"tolerance": tolerance, "up_to": up_to, "decide": tuple(sorted(set(decide))) if decide else None}
    plan = usual.model_copy(update={key: value for key, value in given.items() if value is not None})
    noise_kind(plan.noise)
    if plan.up_to is not None and plan.tolerance is None:
        raise InputError("--up-to says how far a curve goes whose tolerance is given. Give --tolerance too.")
    _ = plan.stopping  # whether it can be
    for value in sigmas:
        check_sigma(value)
    check_samples(plan.n)
    check_samples(plan.n0, "n0")
    check_confidence(plan.alpha)
    numbers = chosen_images(index, count)
    device = use_machine(recipe)
    data = load_data(recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options)
    screen = console()
    progress = make_progress(screen)
    ledgers = []
    with locked(work.folder):
        try:
            for name in names:
                for value in sigmas:
                    settings = plan.model_copy(update={"sigma": value})
                    ledgers.append(
                        smooth_network(work, name, settings, data, device, indices=numbers, progress=progress)
                    )
        finally:
            progress.close()
    for path in ledgers:
        header, verdicts = read_smoothed_ledger(path)
        found = f"{radii_text(verdicts, plan.radii)} ({header['norm']}){samples_text(verdicts, plan)}"
        screen.print(f"{path}: {len(verdicts)} images, {found}", soft_wrap=True)
