"""From the nodes that torch.fx recorded to the nodes of a graph, whose operations have known bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..errors import InputError, UnsupportedLayer
from . import spellings
from .recording import Run
from .shapes import of_shapes

BATCHES = (2, 3)  # two batch sizes, so that a constant which is secretly the batch size is found out


@dataclass(frozen=True)
class Node:
    """One operation to be: ``build(value of its input)`` makes it from the weights of the moment."""

    name: str
    inputs: tuple[int, ...]  # places in the list of nodes; 0 is the network's input
    shape: tuple[int, ...]  # of one sample's output
    build: Callable[[Tensor | None], Any] | None  # None: the network's input


class Builder:
    """Turns recorded fx nodes into nodes of a graph; converters (layers.py) ask it about inputs, shapes and constants.

    ``owners``: of every layer that was looked up, and of the blocks on the way: its parent, its name and itself.
    """

    def __init__(self, model: nn.Module, module: fx.GraphModule, runs: list[Run]):
        self.model, self.module, self.runs = model, module, runs
        self.places: dict[fx.Node, int] = {}
        self.computed: set[fx.Node] = set()  # nodes whose value depends on the network's input
        self.owners: list[tuple[nn.Module, str, nn.Module]] = []

    def nodes(self, input_shape: tuple[int, ...]) -> list[Node]:
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
                elif not of_shapes(node):
                    raise self.unsupported(
                        node, "it makes something else than a tensor of the input, and not of its shape alone"
                    )
        raise UnsupportedLayer("The traced model returns nothing.")

    def _finish(self, nodes: list[Node], result: Any) -> list[Node]:
        is_tensor = isinstance(result, fx.Node) and self._is_tensor(result)
        shape = tuple(self.runs[0].values[result].shape) if is_tensor else None
        if shape is None or len(shape) != 2 or result not in self.places:
            raise InputError(f"The model should return logits of shape (batch, classes), but returns {shape}.")
        return nodes[: self.places[result] + 1]

    def _add(self, nodes: list[Node], node: fx.Node) -> None:
        shape = tuple(self.runs[0].values[node].shape)
        if not shape or shape[0] != BATCHES[0] or self.runs[1].values[node].shape[0] != BATCHES[1]:
            raise self.unsupported(node, "its result does not keep the batch as first dimension")
        inputs, build = spellings.convert(self, node)
        self._check_memory(node)
        if build is None:  # an identity
            self.places[node] = self.places[inputs[0]]
            return
        self.places[node] = len(nodes)
        nodes.append(Node(node.name, tuple(self.places[i] for i in inputs), shape[1:], build))

    def _check_memory(self, node: fx.Node) -> None:
        """What is changed in place changes under all of its names (views, nn.Identity); the graph sees none of that."""
        nodes = list(self.module.graph.nodes)
        before = set(nodes[: nodes.index(node)])
        for run in self.runs:
            for changed in run.overwritten[node]:
                memory = run.memory.get(changed)
                if memory is None:  # it holds nothing
                    continue
                if memory == run.memory.get(nodes[0]):
                    raise self.unsupported(node, "it overwrites the network's input in place; let it work on a copy")
                same = {other for other in before if run.memory.get(other) == memory}
                readers = (user for user in nodes[len(before) + 1 :] if same.intersection(user.all_input_nodes))
                if (reader := next(readers, None)) is not None:
                    why = f"it overwrites '{changed.name}' in place, which '{reader.name}' reads again later"
                    raise self.unsupported(node, why)

    # What converters ask.

    def is_computed(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.places

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.runs[0].values[node].shape[1:])

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
            first, second = (run.values[value] for run in self.runs)
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
        return isinstance(self.runs[0].values[node], Tensor)


_OURS = re.compile(r"/torch/|/certifiers/bounds/")


def _source(stack_trace: str | None) -> str:
    """Where in the user's own code a node comes from: the last such frame, as `` (file, line: code)``."""
    lines = [line.strip() for line in (stack_trace or "").splitlines()]
    frames = [i for i, line in enumerate(lines[:-1]) if line.startswith("File ") and not _OURS.search(line)]
    return f" ({lines[frames[-1]]}: {lines[frames[-1] + 1]})" if frames else ""
