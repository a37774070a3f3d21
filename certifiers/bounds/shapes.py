"""Numbers that are computed from shapes, and so are constants although they come from the network's input."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda"}  # the last four go with the key of the graph
_METHODS = {"size", "dim", "ndimension", "numel", "nelement"}
_FUNCTIONS = {len, torch.numel}
_ARITHMETIC = {
    *(operator.getitem, operator.neg, operator.abs, operator.pow, operator.mod, operator.imod),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(int, float, min, max, round, math.prod, math.sqrt, math.floor, math.ceil),
    torch._assert,  # of such numbers it can only stop the network
}


def of_shapes(node: fx.Node) -> bool:
    """Whether ``node`` is a shape, or computed from nothing but shapes and numbers in the code."""
    if node.op == "call_method" and node.target in _METHODS:
        return True
    if node.op != "call_function":
        return False
    if node.target in _FUNCTIONS or (node.target is getattr and node.args[1] in _ATTRIBUTES):
        return True
    return node.target in _ARITHMETIC and all(of_shapes(parent) for parent in node.all_input_nodes)
