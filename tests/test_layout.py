"""The direction of imports, and that everything which a registry names can be imported."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((*ROOT.glob("certifiers/**/*.py"), *ROOT.glob("certprune/**/*.py")))
BRIDGED = {"torchvision": "import_torchvision", "auto_LiRPA": "import_auto_lirpa"}


def imported(path: Path) -> set[str]:
    """The top-level names of the packages that a file imports, inside functions too, and of import_module's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            names |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_reader_of_imports_sees_all_forms(tmp_path):
    source = tmp_path / "a.py"
    source.write_text(
        "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n    importlib.import_module('i.j')\n"
    )
    assert imported(source) == {"a", "c", "h", "i"}


def test_there_is_something_to_check():
    assert {module_name(p).split(".")[0] for p in SOURCES} == {"certifiers", "certprune"}
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "certifiers")], ids=module_name)
def test_certifiers_never_imports_certprune(path):
    assert "certprune" not in imported(path)


def test_only_the_bridges_import_what_needs_a_bridge():
    importers = {name: {module_name(p) for p in SOURCES if name in imported(p)} for name in BRIDGED}
    assert importers["auto_LiRPA"] == {"certifiers.bridges"}
    # Inside certprune, torchvision's data sets are imported once the bridge has made that possible.
    for module in importers["torchvision"] - {"certifiers.bridges"}:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert "import_torchvision()" in source, module


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_can_be_imported(path):
    importlib.import_module(module_name(path))


@pytest.mark.parametrize(
    ("module", "registry"),
    [
        ("certifiers.methods", "METHODS"),
        ("certprune.data", "DATASETS"),
        ("certprune.models", "MODELS"),
        ("certprune.objectives", "OBJECTIVES"),
        ("certprune.pruning", "BUDGETS"),
        ("certprune.pruning", "CRITERIA"),
    ],
)
def test_every_registered_piece_is_there(module, registry):
    pieces = getattr(importlib.import_module(module), registry)
    assert pieces
    for name, piece in pieces.items():
        assert name == name.lower() and piece is not None
        assert callable(piece) or hasattr(piece, "scores") or hasattr(piece, "count"), name


def test_no_pickles():
    """Weights are safetensors; torch.load, where it is used, takes plain tensors only."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in {f"{m}.{f}" for m in ("pickle", "joblib") for f in ("load", "loads", "dump")}, path
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
