"""Every exception the product raises: mistakes a user can correct, apart from our own bugs.

A message is one line, names the site, node, file or key it is about and says what to do next.
"""


class PrecisionError(Exception):
    """Base class of every mistake that the user can correct."""


class FormatError(PrecisionError):
    """An unknown number format was named."""


class TargetError(PrecisionError):
    """A target is unknown, or its TOML file holds a wrong key, unit or value."""


class BudgetError(PrecisionError):
    """A budget is malformed, or no assignment fits inside it."""


class CaptureError(PrecisionError):
    """The model and batch do not give one joint graph with a scalar loss."""


class AnalysisError(PrecisionError):
    """The gradient error cannot be predicted on this batch (no gradient, or not finite)."""


class PlanError(PrecisionError):
    """A plan file is missing, corrupt, or of another schema version."""


class PlanMismatch(PrecisionError):
    """A plan belongs to another model than the one it is applied to."""


class WorkloadError(PrecisionError):
    """A WORKLOAD argument does not name a function that returns a Workload."""


class ExportError(PrecisionError):
    """A model cannot be written as ONNX, or the written file failed its check."""


class OnnxImportError(PrecisionError):
    """An ONNX file cannot be read: it holds an operator or data that the importer does not know."""


class ToolchainError(PrecisionError):
    """Something outside Python that compiling needs, such as a C++ compiler, is missing."""


class InternalError(Exception):
    """A bug of this package: please report it with the message."""


class OrderError(InternalError):
    """A pipeline lists a pass before the pass that makes what it reads."""


class VerifyError(InternalError):
    """A graph broke an invariant of its stage after a pass."""
