"""The files of a report: the page, and in a run's own folder also the curve and the figures for other programs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from certifiers.errors import InputError
from certprune.reports.curves import radius_run_curves, run_curves, smoothed_run_curves
from certprune.reports.html import report_html
from certprune.reports.plot import save_curves
from certprune.reports.radius_rows import radius_rows
from certprune.reports.read import RunView, read_run
from certprune.reports.rows import summary_rows
from certprune.reports.smoothed_rows import smoothed_rows
from certprune.reports.sparsity import many_networks, sparsity_csv
from certprune.reports.sparsity_charts import sparsity_figure
from certprune.storage import write_bytes, write_json, write_text


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one HTML page for one or more run folders and return its path.

    Without ``out`` (one run only) the page is ``report.html`` in the run's folder, with ``curves.png``,
    ``curves.csv`` and ``summary.json`` beside it, ``sparsity.png`` with ``sparsity.csv`` where networks of several
    sparsities were certified, and ``radii.png`` with ``radii.csv`` where the largest eps of images was found.
    Raises InputError for a folder that is no run, and for several without ``out``; what an unfinished run lacks is
    said on the page.
    """
    folders = [Path(folders)] if isinstance(folders, (str, Path)) else [Path(folder) for folder in folders]
    if not folders:
        raise InputError("No run was given. Give at least one run folder, e.g. `certprune report runs/demo`.")
    if out is None and len(folders) > 1:
        raise InputError("A page about several runs belongs in none of their folders: say where to write it, -o FILE.")
    runs = [read_run(folder) for folder in folders]
    if out is None:
        _write_companions(runs[0])
        out = folders[0] / "report.html"
    out = Path(out)
    if out.is_dir():
        raise InputError(
            f"'{out}' is a folder, but the page is one file. Give its name too, e.g. -o {out / 'report.html'}."
        )
    write_text(out, report_html(runs))
    return out


def _write_companions(run: RunView) -> None:
    rows = [asdict(row) for row in summary_rows(run)]
    record = {"name": run.name, "seed": run.seed, "missing": run.missing, "alarms": run.alarms, "rows": rows}
    radii = [asdict(row) for rows in radius_rows(run) for row in rows]
    record |= {"radii": radii} if radii else {}
    smoothed = [asdict(row) for rows in smoothed_rows(run) for row in rows]
    write_json(run.folder / "summary.json", record | ({"smoothing": smoothed} if smoothed else {}))
    curves = run_curves(run)
    if curves:
        save_curves(curves, run.folder / ("curves.csv" if many_networks(run) else "curves.png"))
    found = radius_run_curves(run)
    if found:
        save_curves(found, run.folder / ("radii.csv" if many_networks(run) else "radii.png"))
    staircases = smoothed_run_curves(run)
    if staircases:
        save_curves(staircases, run.folder / ("smoothing.csv" if many_networks(run) else "smoothing.png"))
    picture = sparsity_figure(run)
    if picture is not None:
        write_bytes(run.folder / "sparsity.png", picture)
        write_text(run.folder / "sparsity.csv", sparsity_csv(run))
