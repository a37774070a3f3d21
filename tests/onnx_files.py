"""ONNX files made by hand, for tests of what reads them."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from certifiers.vnncomp import read_network


def made(tmp_path, nodes, weights, shape, opset=13):
    """The network in a file made of these nodes, from X to Y."""
    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes],
        "made",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(file, str(tmp_path / "made.onnx"))
    return read_network(tmp_path / "made.onnx")


def weight(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
