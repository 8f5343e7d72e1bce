"""How a plan is written into the metadata of an ONNX model and of its nodes."""

import base64
import json
import zlib

from precision_compiler.plan import NodeChoice, Plan

PLAN_KEY = "precision_compiler.plan.zlib.base64"
"""Metadata key of the model: the whole plan."""

_PREFIX = "precision_compiler."


def plan_entries(plan: Plan) -> dict[str, str]:
    """Metadata of the model: the plan, and its main numbers to read without unpacking it."""
    packed = base64.b64encode(zlib.compress(plan.to_json().encode())).decode()
    error = "predicted_output_error" if plan.measures == "outputs" else "predicted_gradient_error"
    return {
        PLAN_KEY: packed,
        f"{_PREFIX}target": plan.target,
        f"{_PREFIX}budget": f"{plan.budget.asked} = {plan.budget.limit:.4g}",
        f"{_PREFIX}fingerprint": plan.fingerprint,
        f"{_PREFIX}{error}": f"{plan.predicted_gradient_error:.4g}",
        f"{_PREFIX}predicted_seconds": f"{plan.predicted_seconds:.4g}",
        f"{_PREFIX}versions": json.dumps(dict(plan.versions)),
    }


def node_entries(choice: NodeChoice, shows: str | None = None) -> dict[str, str]:
    """Metadata of a node.

    Args:
        choice: what was decided for it.
        shows: stable name of the node whose elements it shows, if it only moves them.
    """
    words = {
        "node": choice.name,
        "compute_format": choice.compute_format,
        "storage_format": choice.storage_format,
        "reason": choice.reason,
        "predicted_seconds": f"{choice.seconds:.4g}",
        "predicted_error": f"{choice.error:.4g}",
    }
    if choice.site is not None:
        words["site"] = choice.site
    if shows is not None:
        words["shows"] = shows
    return {f"{_PREFIX}{key}": value for key, value in words.items()}
