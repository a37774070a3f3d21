"""Margin bounds by auto_LiRPA: any graph it supports, alpha-CROWN, and an independent reference for our own.

References: Zhang et al. 2018 (CROWN, arXiv 1811.00866), Xu et al. 2020 (auto_LiRPA, arXiv 2002.12920), Xu et
al. 2021 (alpha-CROWN, arXiv 2011.13824).
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from certifiers.bridges import import_auto_lirpa
from certifiers.elementwise import constants_as_layers, diagonal_layer
from certifiers.errors import InputError, UnsupportedLayer
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
    back detached and is never below "crown". An l2 ball is bounded as it is, without the cut to [0, 1], which
    is sound and a little looser. Memory grows with the batch times the square of the layers' widths.

    Raises InputError for what the caller can mend, UnsupportedLayer for what auto_LiRPA cannot bound.
    """
    _check(model, method, iterations, lr)
    lirpa = import_auto_lirpa()
    optimise = method == "alpha-crown"
    with _quiet(), _default_dtype(x.dtype), torch.enable_grad() if optimise else ExitStack():
        with torch.no_grad():
            logits = model(x)
        check_inputs(x, y, logits.shape[1])
        network = constants_as_layers(_copy(model, share=not optimise), x)
        with _failures_named(method):
            bounded = _bounded_module(lirpa, network, x, logits, iterations, lr)
            if threat.norm == "l2" and not _starts_linear(bounded):
                network = _behind_identity(network, x)
                bounded = _bounded_module(lirpa, network, x, logits, iterations, lr)
        inputs = (lirpa.BoundedTensor(x.detach(), _perturbation(lirpa, x.detach(), threat)),)
        others = torch.ones_like(logits, dtype=torch.bool).scatter(1, y[:, None], False)
        rows = _margin_rows(others, y, x.dtype)
        with _failures_named(method):
            bounds = bounded.compute_bounds(x=inputs, C=rows, method=method, bound_upper=method == "ibp")[0]
    bounds = bounds.detach() if optimise else bounds
    return torch.zeros_like(logits).masked_scatter(others, bounds)


def _check(model: nn.Module, method: str, iterations: int, lr: float) -> None:
    if method not in METHODS:
        raise InputError(f"auto_LiRPA's methods here are {', '.join(METHODS)}, not {method!r}.")
    if iterations < 1 or not lr > 0:
        raise InputError(
            f"alpha-CROWN needs at least one iteration and a step size above 0; {iterations} and {lr} came."
        )
    if any(module.training for module in model.modules()):
        raise InputError("The model is in training mode, which no certificate is about. Call model.eval() first.")
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise InputError(
            "The model has parametrized weights (masks, for example), which auto_LiRPA does not trace. Make "
            "them plain first, with materialize(model) or torch.nn.utils.parametrize.remove_parametrizations."
        )


def _copy(model: nn.Module, share: bool) -> nn.Module:
    """A copy of the modules, which auto_LiRPA may change, without dropout, which is nothing in eval mode.

    If `share`, the copy has the model's own parameters, so that gradients arrive there; else its own, without
    gradients, so that the optimisation of the slopes leaves none in the model.
    """
    tensors = itertools.chain(model.parameters(), model.buffers()) if share else ()
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    if not share:
        twin.requires_grad_(False)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(parent, name, nn.Identity())
    return twin


def _bounded_module(
    lirpa: types.ModuleType, network: nn.Module, x: Tensor, logits: Tensor, iterations: int, lr: float
) -> Any:
    """The network as auto_LiRPA's graph, after a check that both compute the same logits."""
    options = {
        # Both savings of 0.3 fail: for residual convolutions, and where most units of a layer are unstable.
        "sparse_spec_alpha": False,
        "sparse_features_alpha": False,
        "optimize_bound_args": {"iteration": iterations, "lr_alpha": lr},
    }
    with _unsupported_operations() as unsupported, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        try:
            bounded = lirpa.BoundedModule(network.eval(), x.detach(), bound_opts=options, device=x.device)
        except NotImplementedError as error:
            raise UnsupportedLayer(
                f"auto_LiRPA cannot bound this network because of {', '.join(unsupported) or _reason(error)}. "
                "Write it with layers that auto_LiRPA supports, or use another method."
            ) from error
    if any("to a Python boolean" in str(warning.message) for warning in warned):
        raise UnsupportedLayer(
            "auto_LiRPA traces one run of the network, but this network's forward pass branches on a tensor "
            f"({warned[0].filename}:{warned[0].lineno}), so that the trace would hold for that one input. "
            "Write it without the branch, or use another method."
        )
    bounded.eval()
    with torch.no_grad():
        same = torch.allclose(bounded(x.detach()), logits, rtol=1e-3, atol=1e-4 * (1 + float(logits.abs().max())))
    if not same:
        raise UnsupportedLayer(
            "auto_LiRPA's graph of this network computes other logits than the network itself, so its bounds "
            "would be about something else. Use another method for this network."
        )
    return bounded


def _starts_linear(bounded: Any) -> bool:
    """Is whatever meets the input a linear layer or a convolution, flattening aside?

    auto_LiRPA bounds the first layer over the l2 ball itself. Any other operation there (all versions: ReLU,
    addition, multiplication) takes the ball for the clean input alone, so that the bounds are not sound.
    """
    waiting = [node for node in bounded._modules.values() if type(node).__name__ == "BoundInput"]
    while waiting:
        for consumer in (bounded[name] for name in waiting.pop().output_name):
            if type(consumer).__name__ in ("BoundFlatten", "BoundReshape"):
                waiting.append(consumer)
            elif type(consumer).__name__ not in ("BoundLinear", "BoundConv"):
                return False
    return True


def _behind_identity(network: nn.Module, x: Tensor) -> nn.Module:
    """The network behind a linear layer that changes nothing: what :func:`_starts_linear` asks for."""
    identity = diagonal_layer(x.shape, x)
    if identity is None:
        raise UnsupportedLayer(
            "auto_LiRPA bounds an l2 ball soundly only where a linear layer or a convolution comes first. Put "
            f"one in front of this network, whose inputs are of shape {tuple(x.shape[1:])}, or use another method."
        )
    return nn.Sequential(identity, network)


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
    """Whatever fails inside auto_LiRPA becomes an UnsupportedLayer that names the place; lack of memory does not."""
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
def _unsupported_operations() -> Iterator[list[str]]:
    """Collect the operations that auto_LiRPA names in its log, by kind and place; nothing is printed."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for node in record.args if isinstance(record.args, tuple) else ():
                if hasattr(node, "op") and hasattr(node, "name"):
                    found.append(f"{node.op} (at {node.name})")

    log, handler = logging.getLogger("auto_LiRPA.utils"), Collect(logging.ERROR)
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


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
