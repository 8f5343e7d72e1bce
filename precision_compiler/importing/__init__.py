"""Existing ONNX files enter: read, translated to torch, and captured for analysis."""

from precision_compiler.importing.importer import Imported, import_graph
from precision_compiler.importing.joint import joint_of

__all__ = ["Imported", "import_graph", "joint_of"]
