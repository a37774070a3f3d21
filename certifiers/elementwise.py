"""Constant scales and shifts (normalisation) rewritten as linear layers, for bounding libraries that want those.

auto_LiRPA stops at `(x - mean) / std` before a convolution, and loses the radius of an l2 ball there. As a 1x1
convolution with a diagonal weight, the same map gives it no trouble.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

LARGEST_DIAGONAL = 4096  # channels; the weight is square in them

_DIVIDE = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
_SCALE_OR_SHIFT = _DIVIDE | {
    *(operator.add, operator.iadd, torch.add, "add", "add_"),
    *(operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    *(operator.mul, operator.imul, torch.mul, "mul", "mul_"),
}


def constants_as_layers(model: nn.Module, x: Tensor) -> nn.Module:
    """The same function, with each scale or shift by numbers or buffers, per channel, as a diagonal layer.

    Logits differ by rounding only. Submodules and parameters are shared with `model`. Where nothing is to be
    done, or torch.fx cannot trace the model, `model` itself is returned. `x` (batch, ...) gives the shapes.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception:  # whatever a forward raises when it meets a proxy instead of a tensor
        return model
    candidates = [node for node in traced.graph.nodes if _source(traced, node) is not None]
    if not candidates:
        return model
    with torch.no_grad():
        ShapeProp(traced).propagate(x[:1])
    made: dict[fx.Node, tuple[fx.Node, Tensor, Tensor]] = {}
    for node in candidates:
        source = _source(traced, node)
        coefficients = _coefficients(traced, node, source)
        if coefficients is None:
            continue
        scale, shift = coefficients
        if source in made:  # one layer for a chain of them, as in (x - mean) / std
            source, first_scale, first_shift = made[source]
            scale, shift = scale * first_scale, scale * first_shift + shift
        made[node] = source, scale, shift
    for place, (node, (source, scale, shift)) in enumerate(made.items()):
        name = f"scale_and_shift_{place}"
        traced.add_module(name, diagonal_layer(source.meta["tensor_meta"].shape, x, scale, shift))
        with traced.graph.inserting_after(node):
            node.replace_all_uses_with(traced.graph.call_module(name, (source,)))
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def diagonal_layer(
    shape: tuple[int, ...], like: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> nn.Module | None:
    """`scale * x + shift` per channel (default: the identity) for `shape` (batch, channels[, height, width]).

    In the dtype and on the device of `like`, without gradients; None for a shape that it is not made for.
    """
    if len(shape) not in (2, 4) or shape[1] > LARGEST_DIAGONAL:
        return None
    channels = shape[1]
    layer = nn.Conv2d(channels, channels, 1) if len(shape) == 4 else nn.Linear(channels, channels)
    layer = layer.to(like.device, like.dtype).eval().requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_((torch.ones(channels) if scale is None else scale).diag().view_as(layer.weight))
        layer.bias.copy_(torch.zeros(channels) if shift is None else shift)
    return layer


def _source(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What the node scales or shifts by a constant; None if it does anything else."""
    if node.target not in _SCALE_OR_SHIFT or len(node.args) != 2 or node.kwargs:
        return None
    varying = [a for a in node.args if _constant(traced, a) is None]
    if len(varying) != 1 or not isinstance(varying[0], fx.Node):
        return None
    if varying[0] is not node.args[0] and node.target in _DIVIDE:
        return None
    return varying[0]


def _constant(traced: fx.GraphModule, argument: Any) -> Tensor | None:
    """A number or a buffer as a float64 tensor; None for anything else, parameters included."""
    if isinstance(argument, int | float):
        return torch.tensor(argument, dtype=torch.float64)
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        module, _, name = argument.target.rpartition(".")
        value = getattr(traced.get_submodule(module), name)
        return None if isinstance(value, nn.Parameter) or not isinstance(value, Tensor) else value.double()
    return None


def _coefficients(traced: fx.GraphModule, node: fx.Node, source: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), each (channels,) in float64, read off at 0 and 1; None if they are not per channel."""
    shape = getattr(source.meta.get("tensor_meta"), "shape", ())
    if len(shape) not in (2, 4) or shape[1] > LARGEST_DIAGONAL:
        return None
    zero = torch.zeros(1, shape[1], *[1] * (len(shape) - 2), dtype=torch.float64, device=_device(traced))

    def apply(value: Tensor) -> Tensor:
        arguments = [value if a is source else _constant(traced, a) for a in node.args]
        if node.op == "call_method":
            return getattr(arguments[0], node.target)(arguments[1])
        return node.target(*arguments)

    shift = apply(zero.clone())
    scale = apply(zero + 1) - shift
    if shift.shape != zero.shape:
        return None
    return scale.flatten().cpu(), shift.flatten().cpu()


def _device(traced: fx.GraphModule) -> torch.device:
    return next((t.device for t in (*traced.buffers(), *traced.parameters())), torch.device("cpu"))
