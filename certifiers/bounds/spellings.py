"""How each supported layer may be spelled: as a module, a function or a method of the tensor.

``convert`` looks a node of the traced graph up in these tables; what is not there is an UnsupportedLayer error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import layers
from .layers import Converted
from .overridden import keeps_methods

SUPPORTED = (
    "Linear, Conv2d, BatchNorm1d/2d, ReLU, LeakyReLU, AvgPool2d, AdaptiveAvgPool2d, MaxPool2d, Flatten and reshapes "
    "that keep the batch, index_select of features, sums and differences, constant scale and shift, Dropout and "
    "Identity"
)

MODULES: dict[type[nn.Module], Callable[..., Converted]] = {
    nn.Linear: layers.linear_module,
    nn.Conv2d: layers.conv_module,
    nn.BatchNorm1d: layers.batch_norm_module,
    nn.BatchNorm2d: layers.batch_norm_module,
    nn.ReLU: lambda b, node, m, x: layers.relu(b, node, x),
    nn.LeakyReLU: lambda b, node, m, x: layers.leaky_relu(b, node, x, m.negative_slope),
    nn.AvgPool2d: lambda b, node, m, x: layers.avg_pool(
        b, node, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda b, node, m, x: layers.adaptive_avg_pool(b, node, x, m.output_size),
    nn.MaxPool2d: lambda b, node, m, x: layers.max_pool(
        b, node, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.Flatten: lambda b, node, m, x: layers.reshape(b, node, x),
    nn.Unflatten: lambda b, node, m, x: layers.reshape(b, node, x),
    nn.Dropout: layers.dropout_module,
    nn.Dropout2d: layers.dropout_module,
    nn.Identity: lambda b, node, m, x: layers.identity(b, node, x),
}

FUNCTIONS: dict[Any, Callable[..., Converted]] = {
    F.linear: layers.linear,
    F.conv2d: layers.conv_function,
    torch.conv2d: layers.conv_function,
    F.batch_norm: layers.batch_norm,
    F.relu: layers.relu,
    F.relu_: layers.relu,
    torch.relu: layers.relu,
    torch.relu_: layers.relu,
    F.leaky_relu: layers.leaky_relu,
    F.leaky_relu_: layers.leaky_relu,
    F.avg_pool2d: layers.avg_pool,
    F.adaptive_avg_pool2d: layers.adaptive_avg_pool,
    F.max_pool2d: layers.max_pool,
    torch.max_pool2d: layers.max_pool,
    torch.flatten: layers.reshape,
    torch.reshape: layers.reshape,
    torch.squeeze: layers.reshape,
    torch.unsqueeze: layers.reshape,
    torch.index_select: layers.index_select,
    F.dropout: layers.dropout,
    operator.add: layers.sum_or_difference(1.0),
    operator.iadd: layers.sum_or_difference(1.0),
    torch.add: layers.sum_or_difference(1.0),
    operator.sub: layers.sum_or_difference(-1.0),
    operator.isub: layers.sum_or_difference(-1.0),
    torch.sub: layers.sum_or_difference(-1.0),
    operator.mul: layers.multiply,
    operator.imul: layers.multiply,
    torch.mul: layers.multiply,
    operator.truediv: layers.divide,
    operator.itruediv: layers.divide,
    torch.div: layers.divide,
    operator.neg: layers.negate,
    torch.neg: layers.negate,
}

METHODS: dict[str, Callable[..., Converted]] = {
    "relu": layers.relu,
    "relu_": layers.relu,
    "flatten": layers.reshape,
    "view": layers.reshape,
    "reshape": layers.reshape,
    "unflatten": layers.reshape,
    "squeeze": layers.reshape,
    "unsqueeze": layers.reshape,
    "index_select": layers.index_select,
    "contiguous": layers.identity,
    "clone": layers.identity,
    "add": layers.sum_or_difference(1.0),
    "add_": layers.sum_or_difference(1.0),
    "sub": layers.sum_or_difference(-1.0),
    "sub_": layers.sum_or_difference(-1.0),
    "mul": layers.multiply,
    "mul_": layers.multiply,
    "div": layers.divide,
    "div_": layers.divide,
    "neg": layers.negate,
}


def is_known(module: nn.Module) -> bool:
    """Layers are matched by class; a subclass counts only if it leaves ``forward`` and what that calls alone (as
    parametrisations do), or promises as a :class:`~certifiers.bounds.layers.BatchStatistics` that it differs in
    training alone."""
    return _module_converter(module) is not None


def _module_converter(module: nn.Module) -> Callable[..., Converted] | None:
    for kind, converter in MODULES.items():
        own = converter is layers.batch_norm_module and isinstance(module, layers.BatchStatistics)
        if isinstance(module, kind) and (own or keeps_methods(module, kind)):
            return converter
    return None


def is_batch_norm(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(node.target), (nn.BatchNorm1d, nn.BatchNorm2d))
    return node.target is F.batch_norm


def convert(builder, node: fx.Node) -> Converted:
    """The computed inputs of ``node`` and how to build its operation; unknown nodes raise UnsupportedLayer."""
    if node.op == "call_module":
        module = builder.layer(node)
        converter, leading = _module_converter(module), (module,)
    else:
        table = METHODS if node.op == "call_method" else FUNCTIONS
        converter, leading = table.get(node.target), ()
    if converter is None:
        raise builder.unsupported(node)
    try:
        inputs, build = converter(builder, node, *leading, *node.args, **node.kwargs)
    except TypeError as error:
        raise builder.unsupported(node, f"it is called in a way that is not known ({error})") from error
    if not all(builder.is_computed(i) for i in inputs):
        raise builder.unsupported(node, "its input is a constant")
    return inputs, build
