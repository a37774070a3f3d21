"""A model as auto_LiRPA's graph, kept away from what that library gets wrong.

Its defects named here were found by sampling: bounds above margins that a point of the threat set has. They are
worked around where that costs little and refused where not.
"""

from __future__ import annotations

import copy
import itertools
import logging
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.elementwise import constants_as_layers, diagonal_layer
from certifiers.errors import UnsupportedLayer


def bounded_graph(
    lirpa: types.ModuleType, model: nn.Module, x: Tensor, norm: str, linear: bool, share: bool, settings: dict
) -> Any:
    """The model, in eval mode, as a BoundedModule of `lirpa` for inputs shaped like `x` (batch, ...).

    `norm` is the threat set's, `linear` says that linear bounds will be asked for, not intervals alone. With
    `share` the graph has the model's own parameters, so that gradients arrive there; without, its own, so that
    the optimisation of slopes (`settings`) leaves none in the model. The model is not changed either way.

    Raises UnsupportedLayer for what auto_LiRPA does not trace, or bounds unsoundly.
    """
    network = constants_as_layers(_copy(model, share), x)
    with torch.no_grad():
        logits = model(x)
    bounded = _convert(lirpa, network, x, logits, settings)
    if norm == "l2" and not _starts_linear(bounded):
        bounded = _convert(lirpa, _behind_identity(network, x), x, logits, settings)
    _refuse_unsound(bounded, lirpa.__version__, linear)
    return bounded


def _copy(model: nn.Module, share: bool) -> nn.Module:
    """A copy of the modules, which auto_LiRPA may change, without dropout, which is nothing in eval mode."""
    tensors = itertools.chain(model.parameters(), model.buffers()) if share else ()
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    if not share:
        twin.requires_grad_(False)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(parent, name, nn.Identity())
    return twin


def _convert(lirpa: types.ModuleType, network: nn.Module, x: Tensor, logits: Tensor, settings: dict) -> Any:
    """The network as auto_LiRPA's graph, after a check that it computes `logits` for `x`."""
    options = {
        "conv_mode": "matrix" if any(_is_unusual(module) for module in network.modules()) else "patches",
        # Both savings of 0.3 fail: for residual convolutions, and where most units of a layer are unstable.
        "sparse_spec_alpha": False,
        "sparse_features_alpha": False,
        "optimize_bound_args": settings,
    }
    trainable = {id(parameter): parameter.requires_grad for parameter in network.parameters()}
    with _unsupported_operations() as unsupported, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        try:
            bounded = lirpa.BoundedModule(network.eval(), x.detach(), bound_opts=options, device=x.device)
        except NotImplementedError as error:
            raise UnsupportedLayer(
                f"auto_LiRPA cannot bound this network because of {', '.join(unsupported) or error}. "
                "Write it with layers that auto_LiRPA supports, or use another method."
            ) from error
    taken = [warning for warning in warned if "Converting a tensor to a Python" in str(warning.message)]
    if taken:
        raise UnsupportedLayer(
            "auto_LiRPA traces one run of the network, but this network's forward pass takes a number out of a tensor "
            f"or branches on it ({taken[0].filename}:{taken[0].lineno}), so that the trace would hold for that one "
            "input. Write it without, or use another method."
        )
    bounded.eval()
    _keep_trainable(bounded, trainable)
    with torch.no_grad():
        pairs = [(bounded(x.detach()), logits)]
        for point in (x.detach().mean() + 0 * x, x.detach().roll(1, -1), x.detach().square()):
            pairs.append((bounded(point), network(point)))
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in pairs):
        raise UnsupportedLayer(
            "auto_LiRPA's graph of this network computes other logits than the network itself, so its bounds "
            "would be about something else. Use another method for this network."
        )
    return bounded


def _keep_trainable(bounded: Any, trainable: dict[int, bool]) -> None:
    """auto_LiRPA sets a parameter's requires_grad to its node's training mode: make that what it was."""
    for node in bounded._modules.values():
        if type(node).__name__ == "BoundParams":
            node.train(trainable.get(id(node.param), False))
            node.param.requires_grad_(node.training)


def _is_unusual(module: nn.Module) -> bool:
    """A convolution that auto_LiRPA's fast mode ("patches") bounds unsoundly or not at all, in any version.

    Groups (0.3 and 0.7) and dilation (0.7) gave bounds above sampled margins; sides of unequal stride, padding
    or kernel fail. All are right as matrices.
    """
    if not isinstance(module, nn.Conv2d):
        return False
    sides = (module.kernel_size, module.stride, module.padding, module.dilation)
    unequal = any(isinstance(side, tuple) and side[0] != side[1] for side in sides)
    return module.groups > 1 or module.dilation != (1, 1) or unequal or module.padding_mode != "zeros"


def _refuse_unsound(bounded: Any, version: str, linear: bool) -> None:
    """Raise UnsupportedLayer for operations whose bounds were seen above sampled margins.

    ``linear``: whether linear bounds will be asked for, which are wrong where intervals are not.
    """
    for node in bounded._modules.values():
        why = _unsound(node, version, linear)
        if why is not None:
            raise UnsupportedLayer(
                f"auto_LiRPA {version} gives wrong bounds for {type(node).__name__.removeprefix('Bound')} at "
                f"{node.name}{why and f', because {why}'}. Write the network without it, or use another method."
            )


def _unsound(node: Any, version: str, linear: bool) -> str | None:
    """Why the node's bounds may be wrong, "" where there is no more to say; None where they are right."""
    kind = type(node).__name__
    if kind == "BoundLeakyRelu" and not 0 <= node.alpha <= 1:
        # Outside, intervals have their ends the wrong way round (below 0), or both lines lie on one side (above 1).
        return f"its slope {node.alpha:g} is not from 0 to 1"
    if kind in ("BoundDiv", "BoundReciprocal") and _depends_on_input(node.inputs[-1]):
        # Intervals take the dividend for positive, lines the divisor; a constant dividend is taken for the divisor.
        return "what it divides by depends on the input"
    if kind == "BoundPow" and not linear and not _is_at_least_0(node.inputs[1].forward_value):
        return "its exponent may be negative"
    if not linear:
        return None
    if kind in ("BoundPow", "BoundSqrt"):  # the line above a square root is no tangent
        return ""
    if kind in ("BoundGather", "BoundGatherElements") and _repeats(node):  # all but the last have no weight
        return "it takes some features more than once"
    pool = kind == "BoundAveragePool" and version.startswith("0.3")
    if pool and (list(node.kernel_size) != list(node.stride) or any(node.padding)):
        return "its windows overlap or are padded"
    return None


def _is_at_least_0(value: Any) -> bool:
    return value is not None and bool((torch.as_tensor(value) >= 0).all())


def _depends_on_input(node: Any) -> bool:
    """Does the node's value depend on the network's input, and not on its shape alone?"""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        kind = type(node).__name__
        if kind == "BoundInput":
            return True
        if id(node) not in seen and kind != "BoundShape":
            seen.add(id(node))
            waiting.extend(node.inputs)
    return False


def _repeats(node: Any) -> bool:
    """Does a gathering node take an element of its input twice? Its forward pass has left the indices."""
    along = node.axis if type(node).__name__ == "BoundGatherElements" else 0
    indices = node.index if type(node).__name__ == "BoundGatherElements" else node.indices.flatten()
    return bool((indices.sort(along).values.diff(dim=along) == 0).any())


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


@contextmanager
def _unsupported_operations() -> Iterator[list[str]]:
    """Collect the operations that auto_LiRPA names in its log, by kind and place; nothing is printed."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for node in record.args if isinstance(record.args, tuple) else ():
                if hasattr(node, "op") and hasattr(node, "name"):
                    found.append(f"{(node.attr or {}).get('operator', node.op)} (at {node.name})")

    log, handler = logging.getLogger("auto_LiRPA.utils"), Collect(logging.ERROR)
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
