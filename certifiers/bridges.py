"""Imports of two libraries that do not load as they come on current torch; nothing is touched where they do.

torchvision's compiled half is built against one torch. Beside a CPU-only torch it does not load, and the
import stops at `operator torchvision::nms does not exist`. Two declared operator schemas are enough for data
sets, transforms and classification models.

auto_LiRPA 0.3, the newest release, is older than torch 1.13 and numpy 2. Four bridges make it run, with
bounds equal to those of upstream's 0.7.x, which needs none of them:

1. `numpy.lib.arraysetops` is gone: a stand-in holds the one name imported from it.
2. `torch.onnx.symbolic_helper._set_opset_version` is gone: a stand-in sets the same global.
3. `torch._C.Node` has lost its item access, by which the traced graph's attributes were read.
4. `BoundedModule._named_members` lacks the argument `remove_duplicate` that torch now passes.

1 and 2 are in place during the import alone; 3, and the operator set that 2 chooses, during a trace alone. So
torch and numpy are afterwards as they were; only auto_LiRPA itself stays changed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

from certifiers.errors import InputError

INSTALL_AUTO_LIRPA = "pip install --no-deps auto_LiRPA==0.3"
INSTALL_TORCHVISION = "pip install --no-deps torchvision"

# A torch.library.Library takes its definitions back when it is collected, so it is kept.
_TORCHVISION_OPERATORS: list[torch.library.Library] = []


def import_torchvision() -> types.ModuleType:
    """torchvision; where its compiled operators are missing, data sets, transforms and models still work.

    Raises InputError where torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise InputError(
            f"torchvision could not be imported ({error}). Install the release that goes with your torch "
            f"{torch.__version__}: {INSTALL_TORCHVISION}"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error) or _TORCHVISION_OPERATORS:
            raise
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _TORCHVISION_OPERATORS.append(operators)
    _forget("torchvision")
    return importlib.import_module("torchvision")


def import_auto_lirpa() -> types.ModuleType:
    """auto_LiRPA, ready for current torch and numpy; calling it again changes nothing more.

    The import leaves no trace outside the package: it would set warning filters and a handler on the root
    logger. Raises InputError where auto_LiRPA, or something that it imports, is not installed.
    """
    if "auto_LiRPA" not in sys.modules:
        with _global_state_kept():
            try:
                importlib.import_module("auto_LiRPA")
            except ImportError as error:
                if error.name == "auto_LiRPA":
                    raise _unusable(error) from error
                _import_with_stand_ins()
    package = sys.modules["auto_LiRPA"]
    _accept_remove_duplicate(package.BoundedModule)
    _read_node_attributes_by_item(package.bound_general, package.parse_graph)
    return package


def _unusable(error: ImportError) -> InputError:
    if isinstance(error, ModuleNotFoundError) and error.name == "auto_LiRPA":
        return InputError(
            "auto_LiRPA is not installed. Its release asks for a torch older than yours, so install it "
            f"without its own requirements: {INSTALL_AUTO_LIRPA}"
        )
    if isinstance(error, ModuleNotFoundError):
        return InputError(
            f"auto_LiRPA imports {error.name}, which is not installed. Install it: pip install {error.name}"
        )
    return InputError(
        f"auto_LiRPA does not load beside torch {torch.__version__} and numpy {numpy.__version__} ({error}). "
        f"Install the release that is known to work: {INSTALL_AUTO_LIRPA}"
    )


def _import_with_stand_ins() -> None:
    """Bridges 1 and 2: whichever of the two names is missing is supplied, while the import lasts."""
    _forget("auto_LiRPA")
    helper = importlib.import_module("torch.onnx.symbolic_helper")
    needs_numpy = importlib.util.find_spec("numpy.lib.arraysetops") is None
    needs_opset = not hasattr(helper, "_set_opset_version")
    if needs_numpy:
        stand_in = types.ModuleType("numpy.lib.arraysetops")
        stand_in.isin = numpy.isin
        sys.modules[stand_in.__name__] = stand_in
    if needs_opset:
        helper._set_opset_version = _set_opset_version
    try:
        importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise _unusable(error) from error
    finally:
        if needs_numpy:
            del sys.modules["numpy.lib.arraysetops"]
        if needs_opset:
            del helper._set_opset_version


def _onnx_globals() -> Any:
    """The settings of torch's ONNX tracer, which moved in torch 2.9."""
    try:
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS
    except ImportError:
        from torch.onnx._globals import GLOBALS
    return GLOBALS


def _set_opset_version(version: int) -> None:
    _onnx_globals().export_onnx_opset_version = version


def _accept_remove_duplicate(bounded_module: type) -> None:
    """Bridge 4. Duplicates are always removed, as the released method does."""
    original = bounded_module._named_members
    if "remove_duplicate" in inspect.signature(original).parameters:
        return

    @functools.wraps(original)
    def _named_members(
        self: Any,
        get_members_fn: Callable,
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator:
        return original(self, get_members_fn, prefix, recurse)

    _named_members.__signature__ = inspect.signature(_named_members, follow_wrapped=False)
    bounded_module._named_members = _named_members


def _read_node_attributes_by_item(bound_general: types.ModuleType, parse_graph: types.ModuleType) -> None:
    """Bridge 3, and the other half of 2: what a trace needs of torch is there while it runs, no longer."""
    original = bound_general.parse_module
    upstream_reads_by_name = hasattr(parse_graph, "get_node_attribute")
    if upstream_reads_by_name or hasattr(torch._C.Node, "__getitem__") or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def parse_module(*args: Any, **kwargs: Any) -> Any:
        settings = _onnx_globals()
        opset = settings.export_onnx_opset_version
        torch._C.Node.__getitem__ = importlib.import_module("torch.onnx.symbolic_helper")._node_get
        try:
            return original(*args, **kwargs)
        finally:
            del torch._C.Node.__getitem__
            settings.export_onnx_opset_version = opset

    bound_general.parse_module = parse_module


def _forget(package: str) -> None:
    """Drop what a failed import left behind, so that the next one starts anew."""
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """Keep the warning filters and the root logger's handlers as they are, and warn of nothing meanwhile."""
    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True):
            yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers
