"""The operators of ONNX's own domain that the importer knows, by name."""

from precision_compiler.importing.elementwise import ELEMENTWISE
from precision_compiler.importing.matrix import MATRIX
from precision_compiler.importing.operator import Table
from precision_compiler.importing.quantised import QUANTISED
from precision_compiler.importing.reductions import REDUCTIONS
from precision_compiler.importing.selection import SELECTION
from precision_compiler.importing.shapes import SHAPES

OPERATORS: Table = ELEMENTWISE | REDUCTIONS | SHAPES | SELECTION | MATRIX | QUANTISED
"""Opset 13 to 24; attributes that became inputs in between are taken either way."""
