"""Workloads: the model and batches that a command works on, named on the command line.

A WORKLOAD argument is `file.py:function` or `package.module:function`. The function takes no
arguments and returns a `Workload`.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from precision_compiler.errors import WorkloadError

FORM = "write it as file.py:function or package.module:function"


@dataclass(frozen=True)
class Workload:
    """A model, batches to plan it on, and how to make a loss of its output.

    Attributes:
        model: the model, in the mode and on the device it is trained in.
        batches: an iterable of batches, such as a list or a DataLoader. A batch is what the model
            is called with: a tensor, a tuple (positional arguments) or a dict (keyword arguments).
            Commands analyse the first ones and verify plans on the one after them.
        loss: `loss(output, batch)` returning a scalar. Not needed when the model returns a scalar
            loss itself, or an object with `.loss`.
    """

    model: nn.Module
    batches: Iterable[Any]
    loss: Callable[[Any, Any], Tensor] | None = None

    def first_batch(self) -> Any:
        """The batch that plans are made on."""
        return self.first_batches(1)[0]

    def first_batches(self, most: int) -> list[Any]:
        """Up to ``most`` batches from the first on.

        Raises:
            WorkloadError: there is none.
        """
        found = list(islice(self.batches, most))
        if not found:
            raise WorkloadError("the Workload has no batches: give it at least one, in a list")
        return found


def load_workload(spec: str) -> Workload:
    """Calls the function that `spec` names and returns its Workload.

    Args:
        spec: `file.py:function` or `package.module:function`.

    Returns:
        What the function returned.

    Raises:
        WorkloadError: the file, module or function is missing, or returns something else.
    """
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name):
        raise WorkloadError(f"{spec!r} names no workload: {FORM}")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_named(place)
    function = getattr(module, name, None)
    if function is None:
        raise WorkloadError(f"{place} has no function {name!r}: {_offered(module)}")
    if not callable(function):
        raise WorkloadError(
            f"{spec} is of type {_kind(function)}: it must be a function without arguments"
        )
    workload = function()
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"{spec} returned an object of type {_kind(workload)}: "
            "let it return precision_compiler.Workload(model, batches)"
        )
    return workload


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise WorkloadError(f"there is no file {path}: {FORM}")
    # A name of its own: the file may be called like a module that is loaded already.
    name = f"workload_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise WorkloadError(f"{path} cannot be imported: {FORM}")
    module = importlib.util.module_from_spec(module_spec)
    # As when Python runs the file: it can import its neighbours, and torch finds it by name.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def _module_named(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise WorkloadError(
            f"there is no module {name!r} here or among the installed packages: {FORM}"
        ) from error


def _offered(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__
    ]
    return f"it has {', '.join(sorted(own))}" if own else "it defines no function"


def _kind(value: object) -> str:
    return type(value).__name__
