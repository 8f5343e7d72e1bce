"""Decide which number format every operation of a Transformer's training graph runs in."""

from precision_compiler.backend import compile, plan_of
from precision_compiler.compiler import make_plan
from precision_compiler.errors import (
    AnalysisError,
    BudgetError,
    CaptureError,
    ExportError,
    FormatError,
    PlanError,
    PlanMismatch,
    PrecisionError,
    TargetError,
    ToolchainError,
    WorkloadError,
)
from precision_compiler.export import export_onnx
from precision_compiler.plan import Plan
from precision_compiler.target import Target
from precision_compiler.workload import Workload

__all__ = [
    "AnalysisError",
    "BudgetError",
    "CaptureError",
    "ExportError",
    "FormatError",
    "Plan",
    "PlanError",
    "PlanMismatch",
    "PrecisionError",
    "Target",
    "TargetError",
    "ToolchainError",
    "Workload",
    "WorkloadError",
    "compile",
    "export_onnx",
    "make_plan",
    "plan_of",
]
