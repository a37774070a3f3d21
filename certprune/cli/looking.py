"""``datasets``, ``models`` and ``doctor``: what can be used here, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import Any

from certifiers.errors import InputError
from certprune.cli.app import app, console

# Packages that nothing needs at every turn: what for, and how to get them.
OPTIONAL = {
    "pytest": ("the tests", "pip install 'certprune[test]'"),
    "pyautoattack": ("the method autoattack", "pip install 'certprune[attacks]'"),
    "tensorboard": ("run --tensorboard", "pip install 'certprune[log]'"),
    "ruff": ("make lint", "pip install 'certprune[test]'"),
    "onnx": ("export, verify, certify --external", "pip install 'certprune[vnncomp]'"),
    "onnxruntime": ("export, verify, certify --external", "pip install 'certprune[vnncomp]'"),
}


@app.command()
def datasets() -> None:
    """Which data sets can be used here, and how to get the others."""
    from certprune.data import datasets as rows

    table = _table("Data set", "Usable", "What it is, or how to get it")
    for row in rows():
        table.add_row(row.name, _mark(row.available), _about(row))
    console().print(table)


@app.command()
def models() -> None:
    """Which networks a recipe can name."""
    from certprune.models import models as rows

    table = _table("Model", "What it is", "Options")
    for row in rows():
        table.add_row(row.name, row.summary, ", ".join(row.options))
    console().print(table)
    console().print(
        "torchvision's: model: {name: 'torchvision:resnet34'}. Your own: model: {name: 'package.module:callable'}, "
        "called with (input_shape, classes, **options)."
    )


@app.command()
def doctor() -> None:
    """Versions, devices, bridges; what is missing, how to get it."""
    import torch
    from rich.markup import escape

    from certprune.data import datasets as rows
    from certprune.provenance import PACKAGES, hardware, package_version

    table = _table("Part", "State", "Note")
    table.add_row("python", platform.python_version(), sys.executable)
    for name in PACKAGES:
        found = package_version(name)
        table.add_row(name, found or "[red]missing[/red]", _bridge(name) if found else f"pip install {name}")
    for name, (purpose, remedy) in OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        table.add_row(name, _mark(found), f"for {purpose}" + ("" if found else f": {escape(remedy)}"))
    machine = hardware("cpu")
    table.add_row("processor", f"{machine['cores']} cores", f"{machine['processor']}, {machine['memory_gb']} GB")
    table.add_row("threads", str(torch.get_num_threads()), f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}")
    cuda = torch.cuda.is_available()
    table.add_row("cuda", _mark(cuda), torch.cuda.get_device_name() if cuda else f"torch {torch.__version__} sees none")
    for row in rows():
        table.add_row(f"data: {row.name}", _mark(row.available), _about(row))
    console().print(table)


def _bridge(package: str) -> str:
    """Whether ``package`` loads here, and whether it took a bridge."""
    from certifiers.bridges import import_auto_lirpa, import_torchvision

    load = {"torchvision": import_torchvision, "auto_LiRPA": import_auto_lirpa}.get(package)
    if load is None:
        return ""
    try:
        __import__(package)
        plain = True
    except (ImportError, RuntimeError):
        plain = False
    try:
        load()
    except InputError as error:
        return f"[red]does not load: {error}[/red]"
    return "loads as it is" if plain else "loads over a bridge (certifiers/bridges.py)"


def _about(row: Any) -> str:
    return next((str(value) for key in ("missing", "note", "summary") if (value := getattr(row, key, None))), "")


def _mark(there: bool) -> str:
    return "[green]yes[/green]" if there else "[red]no[/red]"


def _table(*headings: str) -> Any:
    from rich.table import Table

    table = Table(header_style="bold")
    for heading in headings:
        table.add_column(heading)
    return table
