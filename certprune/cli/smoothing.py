"""``smooth``: certificates by randomized smoothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from certifiers.errors import InputError
from certprune.cli.app import app
from certprune.cli.options import chosen_images, chosen_variants
from certprune.cli.sessions import session

if TYPE_CHECKING:
    from certprune.config import SmoothingSettings


@app.command()
def smooth(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. runs/fashion_mnist_gaussian.")],
    sigma: Annotated[
        list[float] | None,
        typer.Option(metavar="SIGMA", help="Of the noise, in pixel units; repeat for several. Default: the recipe's."),
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
        list[float] | None,
        typer.Option(metavar="RADIUS", help="Stop when this radius is certified or out of reach; for several."),
    ] = None,
    shared_noise: Annotated[
        bool | None, typer.Option(help="The same noise for all images: faster, but certificates depend on each other.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Repeat for several; 'pretrain' too. Default: the recipe's variants."),
    ] = None,
    index: Annotated[str | None, typer.Option(metavar="A:B", help="Images A to B - 1 of the split.")] = None,
    count: Annotated[int | None, typer.Option(help="The first so many images of the split.")] = None,
) -> None:
    """Certify radii by randomized smoothing, into the run's ledgers. Skips what is decided, goes on after a cut."""
    from certifiers.smoothing import read_smoothed_ledger
    from certprune.runs import open_run
    from certprune.smoothing import radii_text, samples_text, smooth_network

    work = open_run(folder)
    names = chosen_variants(work.recipe, variant, folder)
    given = {"n": n, "n0": n0, "alpha": alpha, "noise": noise, "shared_noise": shared_noise}
    given |= {"tolerance": tolerance, "up_to": up_to, "decide": tuple(sorted(set(decide))) if decide else None}
    plans = _plans(work.recipe.certify.smoothing, sigma, given)
    numbers = chosen_images(index, count)
    ledgers = []
    with session(work) as here:
        for name in names:
            for plan in plans:
                options = {"indices": numbers, "progress": here.progress}
                ledgers.append((plan, smooth_network(work, name, plan, here.data, here.device, **options)))
    for plan, path in ledgers:
        header, verdicts = read_smoothed_ledger(path)
        found = f"{radii_text(verdicts, plan.radii)} ({header['norm']}){samples_text(verdicts, plan)}"
        here.screen.print(f"{path}: {len(verdicts)} images, {found}", soft_wrap=True)


def _plans(
    usual: SmoothingSettings | None, sigmas: list[float] | None, given: dict[str, Any]
) -> list[SmoothingSettings]:
    """The recipe's settings with what the command gave in their place, once for each sigma; InputError for bad ones."""
    from certifiers.smoothing.bounds import check_confidence, check_samples, check_sigma
    from certifiers.smoothing.kinds import noise_kind
    from certprune.config import SmoothingSettings

    usual = usual or SmoothingSettings()
    sigmas = list(dict.fromkeys(sigmas or ())) or [usual.sigma]
    if sigmas == [None]:
        raise InputError(
            "Neither the recipe nor the command says how much noise to smooth with. Give --sigma, e.g. --sigma 0.25."
        )
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
    return [plan.model_copy(update={"sigma": value}) for value in sigmas]
