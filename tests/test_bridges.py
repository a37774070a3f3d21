"""torchvision and auto_LiRPA load beside this torch, and leave torch, numpy, warnings and logging as they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from certifiers import bridges

ROOT = Path(__file__).resolve().parent.parent
OTHER_LIRPA = os.environ.get("CERTPRUNE_LIRPA_PATH")  # a folder that holds another auto_LiRPA, e.g. upstream's

PRELUDE = """
import json, logging, sys, warnings
import torch
from certifiers import bridges
from certifiers.errors import InputError
"""


def fresh(code: str, *folders: str) -> str:
    """What a new interpreter prints; imports happen once in a process, so each test of them needs its own."""
    path = os.pathsep.join([*folders, str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", PRELUDE + code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout.strip()


def test_torchvision_has_data_sets_transforms_and_models():
    torchvision = bridges.import_torchvision()
    assert bridges.import_torchvision() is torchvision
    assert issubclass(torchvision.datasets.MNIST, torch.utils.data.Dataset)
    assert torchvision.transforms.functional.hflip(torch.tensor([[0.0, 1.0, 2.0]])).tolist() == [[2, 1, 0]]
    assert torchvision.models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_torchvision_operators_are_declared_only_where_missing():
    out = fresh("""
try:
    import torchvision
    plain = True
except RuntimeError:
    plain = False
first = bridges.import_torchvision()
bridges.import_torchvision()
print(plain, len(bridges._TORCHVISION_OPERATORS), first is sys.modules["torchvision"])
""")
    plain, declared, same = out.split()
    assert same == "True"
    assert declared == ("0" if plain == "True" else "1")


def test_another_failure_of_torchvision_is_not_hidden(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::else does not exist')\n")
    code = """
try:
    bridges.import_torchvision()
except RuntimeError as error:
    print(error, bridges._TORCHVISION_OPERATORS)
"""
    assert fresh(code, str(tmp_path)) == "operator torchvision::else does not exist []"


def test_auto_lirpa_is_bridged_once():
    package = bridges.import_auto_lirpa()
    parse, members = package.bound_general.parse_module, package.BoundedModule._named_members
    assert bridges.import_auto_lirpa() is package
    assert package.bound_general.parse_module is parse
    assert package.BoundedModule._named_members is members
    if package.__version__.startswith("0.3"):
        assert not hasattr(parse.__wrapped__, "__wrapped__")
        assert not hasattr(members.__wrapped__, "__wrapped__")


def test_auto_lirpa_computes_and_lists_its_parameters():
    package = bridges.import_auto_lirpa()
    bounded = package.BoundedModule(torch.nn.Linear(2, 1), torch.zeros(1, 2))
    assert len(list(bounded.named_parameters())) == len(list(bounded.parameters())) == 2


def test_torch_numpy_warnings_and_logging_stay_as_they_were():
    code = """
import importlib
symbolic_helper = importlib.import_module("torch.onnx.symbolic_helper")
import numpy.lib
def state():
    return [list(map(str, warnings.filters)), list(logging.root.handlers), logging.root.manager.disable,
            hasattr(torch._C.Node, "__getitem__"), hasattr(symbolic_helper, "_set_opset_version"),
            "numpy.lib.arraysetops" in sys.modules, hasattr(numpy.lib, "arraysetops"),
            bridges._onnx_globals().export_onnx_opset_version, torch.get_default_dtype()]
before = state()
package = bridges.import_auto_lirpa()
assert state() == before, (before, state())
package.BoundedModule(torch.nn.Linear(2, 1), torch.zeros(1, 2))
assert state()[2:] == before[2:], (before, state())
print("kept")
"""
    assert fresh(code) == "kept"


def test_a_failed_trace_leaves_torch_as_it_was():
    package = bridges.import_auto_lirpa()
    opset = bridges._onnx_globals().export_onnx_opset_version

    class Broken(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:  # the first is auto_LiRPA's plain run
                raise RuntimeError("not twice")
            return x

    with pytest.raises(RuntimeError):
        package.BoundedModule(Broken(), torch.zeros(1, 2))
    assert bridges._onnx_globals().export_onnx_opset_version == opset
    if package.__version__.startswith("0.3"):
        assert not hasattr(torch._C.Node, "__getitem__")


ASK = """
sys.modules.pop("auto_LiRPA", None)
try:
    bridges.import_auto_lirpa()
except InputError as error:
    print(error)
"""


def test_a_missing_auto_lirpa_names_the_command():
    hide = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "auto_LiRPA":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""
    out = fresh(hide + ASK)
    assert "auto_LiRPA is not installed" in out
    assert out.endswith("pip install --no-deps auto_LiRPA==0.3")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import surely_missing_package", "pip install surely_missing_package"),
        ("from torch import surely_no_such_name", "pip install --no-deps auto_LiRPA==0.3"),
    ],
)
def test_an_auto_lirpa_that_cannot_load_says_what_to_do(tmp_path, source, expected):
    (tmp_path / "auto_LiRPA").mkdir()
    (tmp_path / "auto_LiRPA" / "__init__.py").write_text(source + "\n")
    out = fresh(ASK, str(tmp_path))
    assert out.endswith(expected)
    assert "\n" not in out


PROBE = """
from certifiers.lirpa import METHODS, margin_lower_bounds_lirpa
from certifiers.threat import L2Ball, LinfBall
from tests.nets import NETS, images
package = bridges.import_auto_lirpa()
x, y = images(3, dtype=torch.float64)
bounds = {
    f"{name} {method} {threat.norm}": margin_lower_bounds_lirpa(
        NETS[name](dtype=torch.float64), x, y, threat, method, iterations=2
    ).tolist()
    for name in NETS
    for method in METHODS
    for threat in (LinfBall(0.03), L2Ball(0.2))
}
bridged = [hasattr(f, "__wrapped__") for f in
           (package.bound_general.parse_module, package.BoundedModule._named_members)]
print(json.dumps([package.__version__, bridged, bounds]))
"""


@pytest.mark.skipif(not OTHER_LIRPA, reason="CERTPRUNE_LIRPA_PATH names no folder with another auto_LiRPA")
def test_upstream_needs_no_bridge_and_bounds_alike():
    installed, bridged, bounds = json.loads(fresh(PROBE))
    other, other_bridged, other_bounds = json.loads(fresh(PROBE, OTHER_LIRPA))
    assert installed != other
    assert bridged == [installed.startswith("0.3")] * 2
    assert other_bridged == [False, False]
    for key, value in bounds.items():
        tolerance = 1e-3 if "alpha" in key else 1e-10  # the optimisers differ in their first steps
        assert (torch.tensor(value) - torch.tensor(other_bounds[key])).abs().max() < tolerance, key


def test_a_missing_torchvision_is_an_input_error():
    hide = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            raise ModuleNotFoundError("No module named 'torchvision'", name=name)
sys.meta_path.insert(0, Hide())
try:
    bridges.import_torchvision()
except InputError as error:
    print(error)
"""
    assert "pip install --no-deps torchvision" in fresh(hide)
