"""Margin bounds by auto_LiRPA: any graph it supports, alpha-CROWN, and an independent reference for our own.

References: Zhang et al. 2018 (CROWN, arXiv 1811.00866), Xu et al. 2020 (auto_LiRPA, arXiv 2002.12920), Xu et
al. 2021 (alpha-CROWN, arXiv 2011.13824).
"""

from __future__ import annotations

import math
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from certifiers.bridges import import_auto_lirpa
from certifiers.errors import InputError, UnsupportedLayer
from certifiers.lirpa_graph import bounded_graph
from certifiers.threat import Threat, check_inputs

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")


def margin_lower_bounds_lirpa(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    method: str = "crown",
    iterations: int = 20,
    lr: float = 0.1,
) -> Tensor:
    """(batch, classes): lower bounds of logit[y] - logit[j] over each input's threat set, 0 in column y.

    `x` is (batch, ...) in [0, 1], `y` (batch,). `model` is in eval mode, in the dtype of `x`, and has no
    parametrizations (masks) left; it is not changed. The bound is differentiable in the model's parameters,
    except for "alpha-crown", which spends `iterations` steps of size `lr` on the slopes of every layer, comes
    back detached and is, up to rounding, never below "crown". An l2 ball is bounded as it is, without the cut
    to [0, 1], which is sound and a little looser. Memory grows with the batch times the square of the layers'
    widths.

    Raises InputError for what the caller can mend, UnsupportedLayer for what auto_LiRPA cannot bound.
    """
    _check(model, method, iterations, lr)
    lirpa = import_auto_lirpa()
    optimise = method == "alpha-crown"
    settings = {"iteration": iterations, "lr_alpha": lr}
    with torch.no_grad():
        logits = model(x)
    check_inputs(x, y, logits.shape[1])
    if len(x) == 0:
        return torch.zeros_like(logits)
    x, y = x.detach(), y.long()
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, y[:, None], False)
    with (
        _quiet(),
        _default_dtype(x.dtype),
        torch.enable_grad() if optimise else nullcontext(),
        _failures_named(method),
    ):
        graph = bounded_graph(
            lirpa, model, x, threat.norm, linear=method != "ibp", share=not optimise, settings=settings
        )
        inputs = (lirpa.BoundedTensor(x, _perturbation(lirpa, x, threat)),)
        rows = _margin_rows(others, y, x.dtype)
        if optimise and not graph.optimizable_activations:
            method = "crown"  # nothing to optimise, which auto_LiRPA takes for a mistake
        bounds, _ = graph.compute_bounds(x=inputs, C=rows, method=method, bound_upper=False)
    bounds = bounds.detach() if optimise else bounds
    return torch.zeros_like(logits).masked_scatter(others, bounds)


def _check(model: nn.Module, method: str, iterations: int, lr: float) -> None:
    if method not in METHODS:
        raise InputError(f"auto_LiRPA's methods here are {', '.join(METHODS)}, not {method!r}.")
    if iterations < 1 or not lr > 0:
        raise InputError(
            f"alpha-CROWN needs at least one iteration and a step size above 0; {iterations} and {lr} came."
        )
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise InputError(
            "The model has parametrized weights (masks, for example), which auto_LiRPA does not trace. Make "
            "them plain first, with materialize(model) or torch.nn.utils.parametrize.remove_parametrizations."
        )
    if any(module.training for module in model.modules()):
        raise InputError("The model is in training mode, which no certificate is about. Call model.eval() first.")


def _perturbation(lirpa: types.ModuleType, x: Tensor, threat: Threat) -> Any:
    eps = float(threat.eps)
    if threat.norm == "l2":
        return lirpa.PerturbationLpNorm(norm=2.0, eps=eps)
    lower, upper = threat.box(x)
    return lirpa.PerturbationLpNorm(norm=math.inf, eps=eps, x_L=lower, x_U=upper)


def _margin_rows(others: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, classes - 1, classes): the matrix from logits to the margins against the other classes."""
    batch, classes = others.shape
    eye = torch.eye(classes, dtype=dtype, device=y.device)
    subtracted = eye.expand(batch, classes, classes)[others].view(batch, classes - 1, classes)
    return eye[y][:, None, :] - subtracted


@contextmanager
def _failures_named(method: str) -> Iterator[None]:
    """Whatever fails inside auto_LiRPA becomes an UnsupportedLayer naming the place; lack of memory does not."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            raise
        raise UnsupportedLayer(
            f"auto_LiRPA cannot bound this network by {method}: {_failing_operation(error)}"
            f"{_reason(error)}. Write that operation in terms of linear layers, convolutions and ReLU, or use "
            "another method."
        ) from error


def _failing_operation(error: BaseException) -> str:
    """The innermost node of the graph in which the error arose, as "BoundTanh at /3/tanh: ", or nothing."""
    nodes = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    named = [n for n in nodes if type(n).__name__.startswith("Bound") and isinstance(getattr(n, "name", 0), str)]
    return f"{type(named[-1]).__name__} at {named[-1].name}: " if named else ""


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().split("\n")[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence auto_LiRPA's prints and warnings."""
    modules = [vars(m) for name, m in list(sys.modules.items()) if name.split(".")[0] == "auto_LiRPA"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for names in modules:
            names["print"] = lambda *args, **kwargs: None
        try:
            yield
        finally:
            for names in modules:
                names.pop("print", None)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """auto_LiRPA makes some tensors in torch's default dtype and rounds its result to it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
