"""Flags: what may go wrong with a plan although its predicted error is small."""

from collections.abc import Mapping
from dataclasses import dataclass

from precision_compiler.journal import STRICT

FLAGS: Mapping[str, str] = {
    "overflow": "values would exceed the largest number of the format",
    "underflow": "values are so small that relative errors rise, or would if they shrank further",
    "flush": "most values would round to zero, all in one direction",
    "coherent": "rounding errors of one sign add up instead of cancelling",
    "invalid": "the predicted error is so large that first-order analysis does not hold",
    "bias": "gradients rounded to nearest in few bits err alike from step to step",
    "unmeasured": "errors were not measured, but taken from a smaller model or from formats alone",
    "silence": "nothing measured depends on the tensor, so no error can be predicted",
    "flips": "errors flip choices such as ReLU's, and what that causes grows with their root",
    "single-element": "the prediction rests on the rounding of a single number",
    "same-sign-sum": "so many terms of one sign that a narrow running sum would stop growing",
    "accumulation": "the target adds products up in a narrow format",
    "update-swamping": "weight updates are smaller than half the spacing of the weights",
    "zero-gradient": "the gradient is zero by the structure of the model; only noise is left",
    "trust-region": "the plan's predicted error is beyond what first-order analysis can vouch for",
    "unverified": "the measured error of the plan is not what was predicted or allowed",
}
"""Every flag by name, with what it means."""


@dataclass(frozen=True)
class Flag:
    """One warning.

    Attributes:
        name: a key of FLAGS.
        site: the site, node or parameter it is about; empty for the plan as a whole.
        format: the format it would happen in; None if it does not depend on one.
        sentence: for people, with the numbers in it.
        numbers: the numbers by name.
        veto: whether it rules the format out at that site.
    """

    __pydantic_config__ = STRICT

    name: str
    site: str
    format: str | None
    sentence: str
    numbers: Mapping[str, float]
    veto: bool
