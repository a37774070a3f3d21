"""Every ONNX operator that can be read: the same values as onnxruntime's, bounds that hold, errors that name it."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, numpy_helper

from certifiers.bounds import trace
from certifiers.errors import UnsupportedLayer
from certifiers.vnncomp import operators
from certifiers.vnncomp.bounding import intervals_of, tightened
from tests.onnx_files import made, weight

IMAGE = ["batch", 2, 6, 6]
READABLE = {
    "gemm as it may be": (
        [("Gemm", ["X", "w", "b"], ["Y"], {"alpha": 0.5, "beta": 2.0})],
        {"w": weight(5, 3), "b": weight(1, 3)},
        [1, 5],
    ),
    "a vector without a batch": (
        [("MatMul", ["w", "X"], ["h"], {}), ("Relu", ["h"], ["Y"], {})],
        {"w": weight(4, 5)},
        [5],
    ),
    "constants on either side": (
        [
            ("Sub", ["c", "X"], ["a"], {}),
            ("Mul", ["a", "c"], ["b"], {}),
            ("Div", ["b", "d"], ["e"], {}),
            ("Neg", ["e"], ["f"], {}),
            ("MatMul", ["f", "w"], ["Y"], {}),
        ],
        {"c": weight(5), "d": weight(1, 5), "w": weight(5, 2)},
        [1, 5],
    ),
    "convolution, pools and a sum of two ways": (
        [
            ("Conv", ["X", "k", "b"], ["a"], {"pads": [1, 1, 1, 1], "group": 2}),
            ("LeakyRelu", ["a"], ["l"], {"alpha": 0.2}),
            ("Conv", ["X", "s"], ["c"], {}),
            ("Add", ["l", "c"], ["d"], {}),
            ("BatchNormalization", ["d", "v", "b", "b", "v"], ["n"], {"epsilon": 0.01}),
            ("MaxPool", ["n"], ["m"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("AveragePool", ["m"], ["p"], {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
            ("Flatten", ["p"], ["Y"], {}),
        ],
        {"k": weight(4, 1, 3, 3), "b": weight(4), "s": weight(4, 2, 1, 1), "v": np.abs(weight(4)) + 1},
        IMAGE,
    ),
    "shapes computed on the way": (
        [
            ("Shape", ["X"], ["s"], {}),
            ("Gather", ["s", "zero"], ["n"], {}),
            ("Unsqueeze", ["n", "axes"], ["u"], {}),
            ("Constant", [], ["rest"], {"value": numpy_helper.from_array(np.array([-1]))}),
            ("Concat", ["u", "rest"], ["to"], {"axis": 0}),
            ("Reshape", ["X", "to"], ["r"], {}),
            ("Gemm", ["r", "w"], ["Y"], {"transB": 1}),
        ],
        {"zero": np.array(0), "axes": np.array([0]), "w": weight(3, 72)},
        IMAGE,
    ),
    "features gathered": (
        [("Gather", ["X", "p"], ["g"], {"axis": 1}), ("Gemm", ["g", "w"], ["Y"], {})],
        {"p": np.array([3, -5, 1]), "w": weight(3, 2)},
        [1, 5],
    ),
    "images with their channels last": (
        [
            ("Transpose", ["X"], ["t"], {"perm": [0, 3, 1, 2]}),
            ("Conv", ["t", "k"], ["c"], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
            ("Relu", ["c"], ["r"], {}),
            ("Transpose", ["r"], ["b"], {"perm": [0, 2, 3, 1]}),
            ("Reshape", ["b", "s"], ["f"], {}),
            ("MatMul", ["f", "w"], ["Y"], {}),
        ],
        {"k": weight(3, 2, 2, 2), "s": np.array([1, -1]), "w": weight(27, 3)},
        [1, 5, 6, 2],
    ),
    "uneven padding, by a convolution and by itself": (
        [
            ("Pad", ["X", "p", "v"], ["a"], {}),
            ("Conv", ["a", "k"], ["c"], {"pads": [0, 2, 1, 0]}),
            ("Flatten", ["c"], ["Y"], {}),
        ],
        {"p": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "v": np.array(0.5, dtype=np.float32), "k": weight(1, 2, 2, 3)},
        IMAGE,
    ),
    "flat values padded": (
        [("Pad", ["X", "p"], ["a"], {}), ("MatMul", ["a", "w"], ["Y"], {})],
        {"p": np.array([0, 1, 0, 2]), "w": weight(8, 2)},
        [1, 5],
    ),
    "padding of old files": (
        [("Pad", ["X"], ["Y"], {"pads": [0, 2, 0, 0], "value": -1.5, "mode": "constant"})], {}, [1, 5], 9
    ),
    "channels put together": (
        [
            ("Conv", ["X", "k"], ["a"], {}),
            ("Concat", ["a", "X", "c", "a"], ["b"], {"axis": 1}),
            ("Flatten", ["b"], ["Y"], {}),
        ],
        {"k": weight(3, 2, 1, 1), "c": weight(1, 1, 6, 6)},
        IMAGE,
    ),
    "rows of an image put together": (
        [("Concat", ["X", "X"], ["b"], {"axis": -2}), ("Flatten", ["b"], ["Y"], {})], {}, IMAGE
    ),
    "vectors put together": (
        [("MatMul", ["w", "X"], ["h"], {}), ("Concat", ["h", "X", "c"], ["Y"], {"axis": 0})],
        {"w": weight(4, 5), "c": weight(2)},
        [5],
    ),
    "split, and put together otherwise": (
        [
            ("Split", ["X", "sizes"], ["a", "b", "c"], {"axis": 1}),
            ("Relu", ["b"], ["r"], {}),
            ("Add", ["c", "r"], ["d"], {}),
            ("Concat", ["d", "a", "r"], ["Y"], {"axis": -1}),
        ],
        {"sizes": np.array([1, 2, 2])},
        [1, 5],
    ),
    "split into parts of one size": (
        [("Split", ["X"], ["a", "b"], {"axis": 2}), ("Sub", ["a", "b"], ["c"], {}), ("Flatten", ["c"], ["Y"], {})],
        {},
        IMAGE,
    ),
    "slices, backwards too": (
        [("Slice", ["X", "from", "to", "axes", "steps"], ["a"], {}), ("Flatten", ["a"], ["Y"], {})],
        {"from": np.array([-1, 0]), "to": np.array([-100, 4]), "axes": np.array([2, 3]), "steps": np.array([-2, 1])},
        IMAGE,
    ),
    "slices of old files": ([("Slice", ["X"], ["Y"], {"starts": [1], "ends": [9], "axes": [1]})], {}, [1, 5], 9),
    "one value gathered, and rows of an image": (
        [
            ("Gather", ["X", "two"], ["a"], {"axis": 3}),
            ("Gather", ["a", "rows"], ["b"], {"axis": 2}),
            ("Flatten", ["b"], ["Y"], {}),
        ],
        {"two": np.array(2), "rows": np.array([[4, 4], [0, -1]])},
        IMAGE,
    ),
    "values repeated": (
        [("Expand", ["X", "s"], ["a"], {}), ("Flatten", ["a"], ["b"], {}), ("Gemm", ["b", "w"], ["Y"], {})],
        {"s": np.array([1, 3, 4]), "w": weight(12, 2)},
        [1, 1, 4],
    ),
    "sums and means": (
        [
            ("ReduceMean", ["X"], ["a"], {"axes": [2, 3], "keepdims": 0}),
            ("ReduceSum", ["X", "axes"], ["s"], {"keepdims": 0}),
            ("Flatten", ["s"], ["b"], {}),
            ("Concat", ["a", "b"], ["Y"], {"axis": 1}),
        ],
        {"axes": np.array([-1])},
        IMAGE,
    ),
    "a sequence": (
        [
            ("Conv", ["X", "k", "b"], ["a"], {"pads": [2, 1], "strides": [2], "dilations": [2]}),
            ("Relu", ["a"], ["r"], {}),
            ("Flatten", ["r"], ["Y"], {}),
        ],
        {"k": weight(3, 2, 2), "b": weight(3)},
        [1, 2, 7],
    ),
    "a transposed convolution": (
        [
            ("ConvTranspose", ["X", "k", "b"], ["a"], {"strides": [2, 2], "pads": [1, 1, 1, 1],
                                                       "output_padding": [1, 0]}),
            ("Flatten", ["a"], ["Y"], {}),
        ],
        {"k": weight(2, 3, 3, 3), "b": weight(3)},
        IMAGE,
    ),
    "clipped": (
        [
            ("Clip", ["X", "low", "high"], ["a"], {}),
            ("Clip", ["a", "", "less"], ["b"], {}),
            ("Clip", ["b", "more"], ["Y"], {}),
        ],
        {
            name: np.array(value, dtype=np.float32)
            for name, value in (("low", -0.75), ("high", 0.5), ("less", 0.25), ("more", -0.5))
        },
        [1, 5],
    ),
    "clipped in old files": ([("Clip", ["X"], ["Y"], {"min": 0.0, "max": 1.0})], {}, [1, 5], 6),
    "the larger and the smaller": (
        [
            ("MatMul", ["X", "w"], ["h"], {}),
            ("Max", ["c", "X", "h"], ["a"], {}),
            ("Min", ["X", "c"], ["b"], {}),
            ("Add", ["a", "b"], ["Y"], {}),
        ],
        {"w": weight(5, 5), "c": weight(5)},
        [1, 5],
    ),
    "sizes without their signs, and slopes by channel": (
        [("PRelu", ["X", "s"], ["a"], {}), ("Abs", ["a"], ["b"], {}), ("Flatten", ["b"], ["Y"], {})],
        {"s": np.array([[[0.25]], [[-1.5]]], dtype=np.float32)},
        IMAGE,
    ),
    "cast to what it is": (
        [("Cast", ["X"], ["a"], {"to": TensorProto.FLOAT}), ("Gemm", ["a", "w"], ["Y"], {})],
        {"w": weight(5, 2)},
        [1, 5],
    ),
    "a transpose that moves nothing, squeezed": (
        [
            ("Transpose", ["X"], ["t"], {"perm": [0, 2, 3, 1]}),
            ("Squeeze", ["t", "axes"], ["q"], {}),
            ("Dropout", ["q"], ["d"], {}),
            ("Identity", ["d"], ["i"], {}),
            ("Gemm", ["i", "w"], ["Y"], {}),
        ],
        {"axes": np.array([1, 3]), "w": weight(5, 3)},
        [1, 1, 1, 5],
    ),
    "an average of everything": (
        [
            ("GlobalAveragePool", ["X"], ["a"], {}),
            ("Reshape", ["a", "s"], ["r"], {}),
            ("Gemm", ["r", "w"], ["Y"], {}),
        ],
        {"s": np.array([0, -1]), "w": weight(2, 3)},
        IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_what_can_be_read_computes_the_same(name, tmp_path):
    network = made(tmp_path, *READABLE[name])
    x = torch.randn(5, network.inputs, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(network.model(x), network.runtime(x), atol=1e-5)
    assert torch.allclose(trace(network.model, (network.inputs,)).bind(x).logits, network.runtime(x), atol=1e-5)


@pytest.mark.parametrize("name", READABLE)
def test_bounds_of_what_can_be_read_hold(name, tmp_path):
    """Interval bounds, and CROWN's in front of ReLUs: no output of 2,000 points of a box lies outside."""
    network = made(tmp_path, *READABLE[name])
    generator = torch.Generator().manual_seed(4)
    middle, width = torch.randn(2, network.inputs, generator=generator, dtype=torch.float64)
    lower, upper = middle - width.abs(), middle + width.abs()
    bound = trace(network.model.double(), (network.inputs,)).bind()
    share = torch.rand(2000, network.inputs, generator=generator, dtype=torch.float64)
    share = torch.cat([share, share.round()])  # corners too
    y = network.model(lower + share * (upper - lower))
    rough = intervals_of(bound, lower[None], upper[None])
    for intervals in (rough, tightened(bound, rough)):
        box = intervals.boxes[-1]
        assert (y >= box.lower - 1e-9).all() and (y <= box.upper + 1e-9).all()


def test_every_operator_is_tried():
    tried = {node[0] for nodes, *_ in READABLE.values() for node in nodes}
    assert set(operators.OPERATORS) - tried == set()


UNREADABLE = {
    "Sigmoid": ([("Sigmoid", ["X"], ["Y"], {})], {}, [1, 5]),
    "Transpose": ([("Transpose", ["X"], ["Y"], {"perm": [1, 0]})], {}, [1, 5]),
    "MatMul": ([("MatMul", ["X", "X"], ["Y"], {})], {}, [1, 1]),
    "MaxPool": ([("MaxPool", ["X"], ["Y"], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]})], {}, IMAGE),
    "Add": ([("Add", ["X", "c"], ["Y"], {})], {"c": weight(3, 1, 5)}, [1, 5]),
    "Gather": ([("Gather", ["X", "p"], ["Y"], {"axis": 0})], {"p": np.array([0, 0])}, IMAGE),
    "Concat": ([("Concat", ["X", "X"], ["Y"], {"axis": 0})], {}, [1, 5]),
    "Pad": ([("Pad", ["X", "p"], ["Y"], {"mode": "reflect"})], {"p": np.array([0, 1, 0, 1])}, [1, 5]),
    "ReduceSum": ([("ReduceSum", ["X", "axes"], ["Y"], {})], {"axes": np.array([0])}, [1, 5]),
    "Cast": (
        [("Cast", ["X"], ["a"], {"to": TensorProto.INT64}), ("Cast", ["a"], ["Y"], {"to": TensorProto.FLOAT})],
        {},
        [1, 5],
    ),
    "ConvTranspose": (
        [("ConvTranspose", ["X", "k"], ["Y"], {"auto_pad": "SAME_UPPER"})],
        {"k": weight(2, 1, 2, 2)},
        IMAGE,
    ),
    "Reshape": ([("Reshape", ["X", "s"], ["Y"], {})], {"s": np.array([72])}, IMAGE),
    "Softmax": ([("Softmax", ["X"], ["Y"], {})], {}, [1, 5]),
}


@pytest.mark.parametrize("operator", UNREADABLE)
def test_what_cannot_be_read_is_named(operator, tmp_path):
    with pytest.raises(UnsupportedLayer, match=f"operator {operator}"):
        made(tmp_path, *UNREADABLE[operator])


def test_what_would_be_too_large_a_matrix_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("certifiers.vnncomp.call.LARGEST_MATRIX", 35)
    with pytest.raises(UnsupportedLayer, match="operator Pad.*matrix of 8 x 5 numbers"):
        made(tmp_path, *READABLE["flat values padded"])


@pytest.mark.parametrize(("ends", "sizes"), [({}, [1, 3]), ({"start": 1}, [3]), ({"start": -2, "end": -1}, [1])])
def test_a_part_of_a_shape(ends, sizes, tmp_path):
    nodes = [("Shape", ["X"], ["s"], ends), ("Cast", ["s"], ["f"], {"to": 1}), ("ReduceSum", ["f"], ["t"], {})]
    network = made(tmp_path, [*nodes, ("Mul", ["X", "t"], ["Y"], {})], {}, [1, 3], opset=15)
    assert torch.allclose(network.model(torch.ones(1, 3)), torch.full((1, 3), float(sum(sizes))))
