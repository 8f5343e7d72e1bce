"""Decide which number format every operation of a Transformer's training graph runs in."""

from precision_compiler.annotate import AnnotationReport, annotate_onnx
from precision_compiler.backend import compile, emulate, plan_of
from precision_compiler.compiler import lower, make_frontier, make_plan, measure_error
from precision_compiler.errors import (
    AnalysisError,
    BudgetError,
    CaptureError,
    ExportError,
    FormatError,
    OnnxImportError,
    PlanError,
    PlanMismatch,
    PrecisionError,
    TargetError,
    ToolchainError,
    WorkloadError,
)
from precision_compiler.explain import Alternative, Explanation, explain
from precision_compiler.export import export_onnx
from precision_compiler.flags import Flag
from precision_compiler.frontier import Frontier, FrontierPoint
from precision_compiler.outcomes import MeasuredError, Verification
from precision_compiler.plan import Plan
from precision_compiler.target import Target
from precision_compiler.workload import Workload

__all__ = [
    "Alternative",
    "AnalysisError",
    "AnnotationReport",
    "BudgetError",
    "CaptureError",
    "Explanation",
    "ExportError",
    "Flag",
    "FormatError",
    "Frontier",
    "FrontierPoint",
    "MeasuredError",
    "OnnxImportError",
    "Plan",
    "PlanError",
    "PlanMismatch",
    "PrecisionError",
    "Target",
    "TargetError",
    "ToolchainError",
    "Verification",
    "Workload",
    "WorkloadError",
    "annotate_onnx",
    "compile",
    "emulate",
    "explain",
    "export_onnx",
    "lower",
    "make_frontier",
    "make_plan",
    "measure_error",
    "plan_of",
]
