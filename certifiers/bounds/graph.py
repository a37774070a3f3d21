"""From an ``nn.Module`` to a short list of operations with known bounds.

:func:`trace` records the structure once (torch.fx); :meth:`Graph.bind` then looks up the weights as they are now,
parametrisations such as masks included, each exactly once, and gives a :class:`Network` of concrete operations.
What is not known is an error that names the node; nothing is ever skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import InputError, UnsupportedLayer
from . import spellings
from .nonlinear import NONLINEAR
from .operations import Conv2d, Linear

_BATCHES = (2, 3)  # two batch sizes, so that a constant which is secretly the batch size is found out


@dataclass(frozen=True)
class Node:
    """One operation to be: ``build(value of its input)`` makes it from the weights of the moment."""

    name: str
    inputs: tuple[int, ...]  # places in the list of nodes; 0 is the network's input
    shape: tuple[int, ...]  # of one sample's output
    build: Callable[[Tensor | None], Any] | None  # None: the network's input


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

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for node, operation in zip(self.nodes[1:], self.operations[1:], strict=True):
            values.append(operation.forward(*(values[i] for i in node.inputs)))
        return values[-1]


class Graph:
    """The structure of a model; holds its layers but none of their values."""

    def __init__(self, model: nn.Module, nodes: list[Node], owners: list[tuple[nn.Module, str, nn.Module]]):
        self.nodes = tuple(nodes)
        self._owners = owners
        self._plain = _plain_attributes(model)

    def is_current(self, model: nn.Module) -> bool:
        """False once a layer of the model, or a block that holds one, has been replaced by another object, or has
        another number or word among its attributes: tracing took those for constants."""
        if not all(getattr(parent, name, None) is child for parent, name, child in self._owners):
            return False
        return torch.compiler.is_compiling() or self._plain == _plain_attributes(model)

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


_PLACE = "_certifiers_graphs"
_OF_MODULES = frozenset(vars(nn.Module()))  # among them `training`, which is a key of the cache
_PLAIN = (bool, int, float, complex, str, tuple, type(None))


def _plain_attributes(model: nn.Module) -> list[dict[str, Any]]:
    """The numbers, words and tuples that modules hold; not those of parametrisations, whose result bind looks up."""
    return [
        {key: value for key, value in vars(module).items() if key not in _OF_MODULES and isinstance(value, _PLAIN)}
        for name, module in model.named_modules()
        if ".parametrizations" not in f".{name}"
    ]


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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return spellings.is_known(module) or super().is_leaf_module(module, qualified_name)


class _Recorder(fx.Interpreter):
    """Runs the traced graph and remembers every node's value; never touches BatchNorm's running statistics."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)

    def run_node(self, node: fx.Node) -> Any:
        if spellings.is_batch_norm(node, self.module):
            return self.env[node.args[0]].clone()
        return super().run_node(node)


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
    runs = [_record(model, module, input_shape, batch) for batch in _BATCHES]
    graph = _Builder(model, module, runs).graph(input_shape)
    check_against_model(graph, model, _random_inputs(model, input_shape, _BATCHES[0]))
    return graph


def _record(model: nn.Module, module: fx.GraphModule, shape: tuple[int, ...], batch: int) -> dict[fx.Node, Any]:
    recorder = _Recorder(module)
    try:
        with torch.no_grad():
            recorder.run(_random_inputs(model, shape, batch), enable_io_processing=False)
    except Exception as error:
        raise InputError(
            f"The model should take inputs of shape (batch, {', '.join(map(str, shape))}), but running it on random "
            f"ones failed: {str(error).splitlines()[0]}. Check the model against the shape of the data."
        ) from error
    return recorder.env


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
        expected, got = model(x.clone()), graph.bind(x).logits
    finally:
        for module, flag in training.items():
            module.training = flag
    scale = expected.abs().amax().clamp(min=1)
    if not torch.allclose(got / scale, expected / scale, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise UnsupportedLayer(
            f"The traced network of {type(model).__name__} computes other values than the model itself (in-place "
            f"changes or Python state in its forward, or a layer changed since it was traced?). Rewrite the forward "
            f"without them, or build the model anew."
        )


class _Builder:
    """Turns recorded fx nodes into a Graph; converters (layers.py) ask it about inputs, shapes and constants."""

    def __init__(self, model: nn.Module, module: fx.GraphModule, runs: list[dict[fx.Node, Any]]):
        self.model, self.module, self.runs = model, module, runs
        self.places: dict[fx.Node, int] = {}
        self.computed: set[fx.Node] = set()  # nodes whose value depends on the network's input
        self.owners: list[tuple[nn.Module, str, nn.Module]] = []

    def graph(self, input_shape: tuple[int, ...]) -> Graph:
        nodes: list[Node] = []
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.computed.add(node)
                self.places[node] = 0
                nodes.append(Node(node.name, (), input_shape, None))
            elif node.op == "output":
                return self._finish(nodes, node.args[0])
            elif any(parent in self.computed for parent in node.all_input_nodes):
                self.computed.add(node)
                if self._is_tensor(node):
                    self._add(nodes, node)
        raise UnsupportedLayer("The traced model returns nothing.")

    def _finish(self, nodes: list[Node], result: Any) -> Graph:
        shape = tuple(self.runs[0][result].shape) if isinstance(result, fx.Node) and self._is_tensor(result) else None
        if shape is None or len(shape) != 2 or result not in self.places:
            raise InputError(f"The model should return logits of shape (batch, classes), but returns {shape}.")
        place = self.places[result]
        return Graph(self.model, nodes[: place + 1], self.owners)

    def _add(self, nodes: list[Node], node: fx.Node) -> None:
        shape = tuple(self.runs[0][node].shape)
        if not shape or shape[0] != _BATCHES[0] or self.runs[1][node].shape[0] != _BATCHES[1]:
            raise self.unsupported(node, "its result does not keep the batch as first dimension")
        inputs, build = spellings.convert(self, node)
        if build is None:  # an identity
            self.places[node] = self.places[inputs[0]]
            return
        self._check_not_overwritten(node)
        self.places[node] = len(nodes)
        nodes.append(Node(node.name, tuple(self.places[i] for i in inputs), shape[1:], build))

    def _check_not_overwritten(self, node: fx.Node) -> None:
        """An in-place layer changes its input under whoever reads it later; the graph would not see that."""
        if not spellings.is_in_place(node, self.module):
            return
        changed = node.all_input_nodes[0]
        order = {n: i for i, n in enumerate(self.module.graph.nodes)}
        if any(order[user] > order[node] for user in changed.users):
            raise self.unsupported(node, f"it overwrites '{changed.name}' in place, which is read again later")

    # What converters ask.

    def is_computed(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.places

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.runs[0][node].shape[1:])

    def layer(self, node: fx.Node) -> nn.Module:
        """The module of a ``call_module`` node."""
        return self._follow(node.target.split("."))

    def _follow(self, path: list[str]) -> nn.Module:
        """The module at ``path``; every step is remembered, so that a later replacement on the way is noticed."""
        module = self.model
        for name in path:
            child = getattr(module, name)
            self.owners.append((module, name, child))
            module = child
        return module

    def constant(self, node: fx.Node, value: Any) -> Callable[[], Any]:
        """A function that gives the present value of an argument that does not depend on the input."""
        if not isinstance(value, fx.Node):
            return lambda: value
        if value in self.computed:  # a number derived from a shape
            first, second = (run[value] for run in self.runs)
            if isinstance(first, Tensor) or first != second:
                raise self.unsupported(node, f"'{value.name}' depends on the input or the batch size")
            return lambda: first
        if value.op == "get_attr":
            *path, name = value.target.split(".")
            owner = self._follow(path)
            return lambda: getattr(owner, name)
        if value.op == "call_module":
            module, arguments = self.layer(value), [self.constant(node, a) for a in value.args]
            return lambda: module(*(a() for a in arguments))
        arguments = [self.constant(node, a) for a in value.args]
        keywords = {k: self.constant(node, a) for k, a in value.kwargs.items()}

        def call() -> Any:
            args = [a() for a in arguments]
            kwargs = {k: a() for k, a in keywords.items()}
            if value.op == "call_method":
                return getattr(args[0], value.target)(*args[1:], **kwargs)
            return value.target(*args, **kwargs)

        return call

    def unsupported(self, node: fx.Node, why: str = "its bounds are not known") -> UnsupportedLayer:
        kind = type(self.module.get_submodule(node.target)).__name__ if node.op == "call_module" else node.target
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", repr(kind))
        source = _source(node.stack_trace)
        return UnsupportedLayer(
            f"Cannot bound node '{node.name}' ({kind}){source}: {why}. Supported are: {spellings.SUPPORTED}. "
            f"Replace the layer, or bound the network with auto_LiRPA (certifiers.lirpa)."
        )

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.runs[0][node], Tensor)


def _source(stack_trace: str | None) -> str:
    """Where in the user's own code a node comes from: the last frame outside torch, as `` (file, line: code)``."""
    lines = [line.strip() for line in (stack_trace or "").splitlines()]
    frames = [i for i, line in enumerate(lines[:-1]) if line.startswith("File ") and "/torch/" not in line]
    return f" ({lines[frames[-1]]}: {lines[frames[-1] + 1]})" if frames else ""


def nonlinear_places(network: Network) -> list[int]:
    """Where the operations are whose relaxation needs the box of their input."""
    return [i for i, operation in enumerate(network.operations) if isinstance(operation, NONLINEAR)]
