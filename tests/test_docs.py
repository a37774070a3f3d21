"""docs/ holds: its sessions print what they show, its python runs, its commands, options, recipes and links exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import typer

from certprune.cli import app
from certprune.models import build_model
from certprune.recipes import load_recipe
from tests import pages
from tests.commands import ROOT

FIRST = ROOT / "docs" / "train.md"  # makes the run that the others go on with
SHOWN = [*pages.PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
OTHERS = {"--nproc-per-node", "--no-deps"}  # options of torchrun and pip
COMMANDS = typer.main.get_command(app).commands


def named(paths):
    return {"argvalues": paths, "ids": [path.name for path in paths]}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder in which the first page was run, and what it shows but did not print."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        return folder, pages.run_page(FIRST)


def test_the_first_page_prints_what_it_shows(first):
    assert not first[1], "\n\n".join(first[1])


@pytest.mark.parametrize(
    "page", **named([p for p in pages.PAGES if p != FIRST and any(b.kind == "console" for b in pages.blocks(p))])
)
def test_a_page_prints_what_it_shows(page, first, tmp_path, monkeypatch):
    if page.name in ("verify.md", "compact.md"):
        pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(first[0], tmp_path / "docs", symlinks=True))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    if page.name == "exchange.md":
        write_hydra_checkpoint(folder / "model_best.pth.tar")
    wrong = pages.run_page(page)
    assert not wrong, "\n\n".join(wrong)


def write_hydra_checkpoint(path):
    """A file in the layout of HYDRA's own."""
    state = build_model("cnn_small", (3, 32, 32), 10).state_dict()
    for key in [key for key in state if key.endswith(".weight")]:
        state[key.replace("weight", "popup_scores")] = torch.randn_like(state[key])
    torch.save({"arch": "cifar_model", "state_dict": state}, path)


@pytest.mark.parametrize("page", **named(SHOWN))
def test_every_command_can_be_parsed_and_its_recipe_read(page):
    own = {b.text.split()[1] for b in pages.blocks(page) if re.match(r"# \w+\.yaml\n", b.text)}
    for words in pages.commands(page):
        if words[1:2] == ["·"]:  # a list of names
            assert {word for word in words if word != "·"} <= COMMANDS.keys()
            continue
        assert words[0] in COMMANDS, words
        context = COMMANDS[words[0]].make_context(words[0], words[1:])
        recipe = context.params.get("config", "")
        mistaken = any("Error:" in line for line in said(page, words))
        if recipe.endswith(".yaml") and recipe not in own | {"RECIPE.yaml"} and not mistaken:
            load_recipe(ROOT / recipe, context.params["settings"] or ())


def said(page, words):
    """What a page shows below this command."""
    return [
        line
        for block in pages.blocks(page)
        if block.kind == "console"
        for command, shown in pages.sessions(block.text)
        if command.split()[1:3] == words[:2] and all(word in command for word in words)
        for line in shown
    ]


@pytest.mark.parametrize("page", **named(SHOWN))
def test_every_command_option_and_path_in_the_text_exists(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    options = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    for code in re.findall(r"`([^`]+)`", text):
        for command in re.findall(r"^(?:certprune|\S*run\.py) ([a-z]+)", code):
            assert command in COMMANDS, code
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in options | OTHERS, code
        for path in re.findall(r"\b(?:configs|results|docs|benchmarks|certprune|certifiers|tests)/[\w/.-]*\w", code):
            assert "NAME" in path or (ROOT / path).exists(), code


@pytest.mark.parametrize("page", **named(SHOWN))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page):
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_names_every_page_and_the_readme_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name}" in index for page in pages.PAGES if page.name != "README.md")
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_line_that_is_not_printed_is_noticed():
    printed = "clean 72.0 %, certified 66.0 %\nReport: runs/smoke/report.html\n"
    assert pages.missing(["clean 1.5 %, …", "Report: …"], printed) is None
    assert pages.missing(["Report: …", "clean 1.5 %, …"], printed) == "clean 1.5 %, …", "in the wrong order"
    assert pages.missing(["clean 72.0 %"], printed) == "clean 72.0 %", "cut off without a word"
