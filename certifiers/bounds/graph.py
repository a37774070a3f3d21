"""From an ``nn.Module`` to a short list of operations with known bounds.

:func:`trace` records the structure once (torch.fx); :meth:`Graph.bind` then looks up the weights as they are now,
parametrisations such as masks included, each exactly once, and gives a :class:`Network` of concrete operations.
What is not known is an error that names the node; nothing is ever skipped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import UnsupportedLayer
from ..fingerprint import plain_attributes
from . import spellings
from .agreement import agree, shaken
from .builder import BATCHES, Builder, Node
from .nonlinear import NONLINEAR
from .operations import Conv2d, Linear
from .overridden import check_overridden
from .recording import record


@dataclass(frozen=True)
class Network:
    """A graph with the weights of one moment: concrete operations, ready for bound propagation.

    ``values[i]`` is the clean output of node i where ``bind`` was given inputs, else the list is empty.
    """

    nodes: tuple[Node, ...]
    operations: tuple[Any, ...]
    values: list[Tensor] = field(default_factory=list)

    @property
    def logits(self) -> Tensor:
        """The clean outputs, ``(batch, classes)``; only after ``bind(x)``."""
        return self.values[-1]

    def size(self) -> Tensor:
        """The sum of the absolute values of the weights of convolutions and linear layers, a scalar."""
        weights = [operation.weight for operation in self.operations if isinstance(operation, Linear | Conv2d)]
        return torch.stack([weight.abs().sum() for weight in weights]).sum()

    def forward(self, x: Tensor, along: Callable[[Tensor], Tensor] = lambda value: value) -> Tensor:
        """The outputs for ``x``, where every value on the way, ``x`` and the outputs among them, is ``along`` of it."""
        values = [along(x)]
        for node, operation in zip(self.nodes[1:], self.operations[1:], strict=True):
            values.append(along(operation.forward(*(values[i] for i in node.inputs))))
        return values[-1]


class Graph:
    """The structure of a model; holds its layers but none of their values."""

    def __init__(self, model: nn.Module, nodes: list[Node], owners: list[tuple[nn.Module, str, nn.Module]]):
        self.nodes = tuple(nodes)
        self._owners = owners
        # What the forward pass itself writes is of the pass that wrote it, and no constant: tracing left a proxy there.
        self._written = {
            (path, key)
            for path, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, fx.Proxy)
        }
        self._plain = _plain_attributes(model, self._written)

    def is_current(self, model: nn.Module) -> bool:
        """False once a layer of the model, or a block that holds one, has been replaced by another object, or has
        another number or word among its attributes, or another tensor or array, also in tuples, lists, dicts and sets:
        tracing took those for constants. Of tensors that take gradients only replacing them counts, as they train; and
        writes to the memory of a tensor's ``data`` go unseen."""
        if not all(getattr(parent, name, None) is child for parent, name, child in self._owners):
            return False
        return torch.compiler.is_compiling() or self._plain == _plain_attributes(model, self._written)

    def bind(self, x: Tensor | None = None) -> Network:
        """Look up all effective weights once; with ``x`` also run the network on it.

        BatchNorm in training mode takes its statistics from ``x`` (and updates the running ones, as a forward
        pass does), so it needs ``x``; in evaluation mode it uses the running ones.

        Args:
            x: clean inputs ``(batch, *shape)``, or None.

        Raises:
            InputError: BatchNorm in training mode without ``x``.
        """
        operations: list[Any] = [None]
        values: list[Tensor] = [] if x is None else [x]
        for node in self.nodes[1:]:
            clean = values[node.inputs[0]] if values else None
            operations.append(node.build(clean))
            if values:
                values.append(operations[-1].forward(*(values[i] for i in node.inputs)))
        return Network(self.nodes, tuple(operations), values)


_TOLERANCE = 1e-4  # of what a graph computes, relative to its outputs' spread
_PLACE = "_certifiers_graphs"


def _plain_attributes(model: nn.Module, without: set[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """The constants that modules hold; not those of parametrisations, whose result bind looks up, nor ``without``."""
    found = {
        path: plain_attributes(module, _Same)
        for path, module in model.named_modules()
        if ".parametrizations" not in f".{path}"
    }
    for path, key in without:
        found.get(path, {}).pop(key, None)
    return found


class _Same:
    """Equal to another of the same tensor, unless it was written to in between; too cheap to look at what it holds."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.version = None if tensor.requires_grad or tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor and self.version == other.version

    __hash__ = None


class _Graphs(dict):
    """The graphs of one model, kept in its ``__dict__``: they go with it, and torch.compile can look them up.

    A graph holds on to the layers it was traced from, so a copy of the model, by whatever way, starts without any.
    """

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        self.owner = None if model is None else id(model)

    def __deepcopy__(self, memo: dict) -> _Graphs:
        return _Graphs()

    def __reduce__(self) -> tuple:
        return _Graphs, ()


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """The graph of ``model`` for inputs of ``input_shape`` (without the batch dimension), cached by model.

    The traced network is run beside the model on random inputs and must agree.

    Raises:
        UnsupportedLayer: an operation without known bounds; the message names the node and what is supported.
        InputError: the model cannot take such inputs, or does not return ``(batch, classes)``.
    """
    if not torch.compiler.is_compiling():
        check_overridden(model)
    like = _like(model)
    key = (tuple(input_shape), model.training, like.dtype, like.device)
    graphs = model.__dict__.get(_PLACE)
    if graphs is None or graphs.owner != id(model):  # a shallow copy shares what belongs to another model
        graphs = model.__dict__[_PLACE] = _Graphs(model)
    if key not in graphs or not graphs[key].is_current(model):
        try:
            graphs[key] = _trace(model, tuple(input_shape))
        except UnsupportedLayer:  # once more, to say where in the code: too slow to ask for each time
            graphs[key] = _trace(model, tuple(input_shape), sources=True)
    return graphs[key]


class _Proxy(fx.Proxy):
    """Records ``a += b`` as what it is: torch.fx makes ``a + b`` of it, and forgets who else reads the memory of a."""


def _recorded(function: Callable) -> Callable:
    def record(self: _Proxy, *others: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, *others), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return spellings.is_known(module) or super().is_leaf_module(module, qualified_name)


def _trace(model: nn.Module, input_shape: tuple[int, ...], sources: bool = False) -> Graph:
    try:
        tracer = _Tracer()
        tracer.record_stack_traces = sources
        fx_graph = tracer.trace(model)
    except Exception as error:  # fx raises many kinds for control flow it cannot follow
        raise UnsupportedLayer(
            f"Bounds need a model whose forward torch.fx can trace, without branches on the data; "
            f"{type(model).__name__} is not: {error}. Rewrite that branch with plain tensor operations."
        ) from error
    module = fx.GraphModule(tracer.root, fx_graph)
    placeholders = [n for n in fx_graph.nodes if n.op == "placeholder"]
    if len(placeholders) != 1:
        raise UnsupportedLayer(f"Bounds are for models of one input; {type(model).__name__} takes {len(placeholders)}.")
    runs = [record(module, _random_inputs(model, input_shape, batch)) for batch in BATCHES]
    builder = Builder(model, module, runs)
    graph = Graph(model, builder.nodes(input_shape), builder.owners)
    check_against_model(graph, model, _random_inputs(model, input_shape, BATCHES[0]))
    return graph


def _like(model: nn.Module) -> Tensor:
    """A tensor of the model's dtype and device."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


def _random_inputs(model: nn.Module, shape: tuple[int, ...], batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((batch, *shape), generator=generator, dtype=_like(model).dtype).to(_like(model).device)


@torch.no_grad()
def check_against_model(graph: Graph, model: nn.Module, x: Tensor) -> None:
    """Raise UnsupportedLayer unless graph and model compute the same on ``x`` (batch, *shape), in evaluation mode.

    A graph that computes something else (in-place changes, Python state, a layer altered since) must never bound
    anything. Tracing checks with random inputs, certification with the inputs at hand.
    """
    training = {m: m.training for m in model.modules()}
    try:
        model.eval()
        expected, network = model(x.clone()), graph.bind(x)
    finally:
        for module, flag in training.items():
            module.training = flag
    if not agree(expected, network.logits, _TOLERANCE, lambda: network.forward(x, shaken)):
        raise UnsupportedLayer(
            f"The traced network of {type(model).__name__} computes other values than the model itself (in-place "
            f"changes or Python state in its forward, or a layer changed since it was traced?). Rewrite the forward "
            f"without them, or build the model anew."
        )


def nonlinear_places(network: Network) -> list[int]:
    """Where the operations are whose relaxation needs the box of their input."""
    return [i for i, operation in enumerate(network.operations) if isinstance(operation, NONLINEAR)]
