"""The packages of the extra ``certprune[vnncomp]``, and how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import InputError


def need(name: str) -> ModuleType:
    """The module ``name`` of onnx or onnxruntime; InputError with the install command if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"Networks in ONNX form need the package {name.partition('.')[0]}, which cannot be imported ({error}). "
            "Install it with: pip install 'certprune[vnncomp]'"
        ) from error
