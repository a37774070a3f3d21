"""The formats of the verification competition (VNN-COMP): ONNX networks, VNN-LIB properties, ``instances.csv``.

:func:`write_instances` gives what other verifiers read; :func:`read_network`, :func:`read_property` and :func:`verify`
take what others wrote: any box of inputs, any disjunction of linear constraints on the outputs. :func:`run_external`
asks another program. All of it needs ``pip install 'certprune[vnncomp]'``.
"""

from .external import ExternalAnswer, run_external, tool_name
from .instances import export_onnx, write_instances
from .network import OnnxNetwork, read_network
from .parse import parse_property, read_property
from .prove import Answer, verify
from .query import Box, Polytope, Property
from .robustness import robustness_text
from .witness import Witness, parse_witness, witness_text

__all__ = [
    "Answer",
    "Box",
    "ExternalAnswer",
    "OnnxNetwork",
    "Polytope",
    "Property",
    "Witness",
    "export_onnx",
    "parse_property",
    "parse_witness",
    "read_network",
    "read_property",
    "robustness_text",
    "run_external",
    "tool_name",
    "verify",
    "witness_text",
    "write_instances",
]
