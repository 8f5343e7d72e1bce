"""The names that users may import are few, documented and importable."""

import inspect

import pytest

import precision_compiler
from precision_compiler import errors

CLASSES = {
    "Alternative",
    "AnnotationReport",
    "Explanation",
    "Flag",
    "Frontier",
    "FrontierPoint",
    "MeasuredError",
    "Plan",
    "Target",
    "Verification",
    "Workload",
}
MAIN_NAMES = CLASSES | {
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
}
ERROR_NAMES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.PrecisionError)
}


def test_public_names_are_these_and_the_errors() -> None:
    assert set(precision_compiler.__all__) == MAIN_NAMES | ERROR_NAMES


@pytest.mark.parametrize("name", sorted(MAIN_NAMES | ERROR_NAMES))
def test_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(precision_compiler, name))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_public_class_documents_its_methods(name: str) -> None:
    methods = vars(getattr(precision_compiler, name)).items()
    public = [(key, value) for key, value in methods if not key.startswith("_")]
    undocumented = [
        key
        for key, value in public
        if (callable(value) or isinstance(value, property | staticmethod | classmethod))
        and not inspect.getdoc(value)
    ]
    assert not undocumented


def test_bugs_of_ours_are_not_mistakes_of_the_user() -> None:
    assert not issubclass(errors.InternalError, errors.PrecisionError)
    assert ERROR_NAMES.isdisjoint({"InternalError", "OrderError", "VerifyError"})
