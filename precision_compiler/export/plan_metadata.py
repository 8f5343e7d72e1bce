"""A plan in the metadata of an ONNX model, which every tool that was tried keeps.

Metadata of nodes is lost where onnxruntime or a version converter saves the model anew; the
model's own is not.
"""

import base64
import json
import os
import zlib
from pathlib import Path

from precision_compiler.errors import ExportError
from precision_compiler.export.onnx_writer import read_metadata
from precision_compiler.plan import Plan

PREFIX = "precision_compiler."
PLAN_KEY = f"{PREFIX}plan.zlib.base64"


def plan_entries(plan: Plan) -> dict[str, str]:
    """Entries for a model: the whole plan, compressed, and what people look for in it."""
    error = "predicted_output_error" if plan.measures == "outputs" else "predicted_gradient_error"
    packed = base64.b64encode(zlib.compress(plan.to_json().encode())).decode()
    return {
        PLAN_KEY: packed,
        f"{PREFIX}target": plan.target,
        f"{PREFIX}budget": f"{plan.budget.asked} = {plan.budget.limit:.4g}",
        f"{PREFIX}fingerprint": plan.fingerprint,
        f"{PREFIX}{error}": f"{plan.predicted_gradient_error:.4g}",
        f"{PREFIX}predicted_seconds": f"{plan.predicted_seconds:.4g}",
        f"{PREFIX}versions": json.dumps(dict(plan.versions)),
    }


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read the plan back from an exported file.

    Raises:
        ExportError: the file cannot be read or carries no plan.
        PlanError: the plan in it is damaged.
    """
    found = read_metadata(Path(path))
    if PLAN_KEY not in found:
        raise ExportError(f"{path} carries no plan: export it with export_onnx")
    try:
        text = zlib.decompress(base64.b64decode(found[PLAN_KEY]))
    except (ValueError, zlib.error) as error:
        raise ExportError(f"the plan in {path} is damaged: {error}") from error
    return Plan.from_json(text, f"the plan in {path}")
