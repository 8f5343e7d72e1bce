"""Call a user's model on a batch, find its loss, and leave everything as it was."""

import contextlib
import itertools
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from precision_compiler.errors import CaptureError

Loss = Callable[[Any, Any], torch.Tensor]

_numbers = itertools.count()

_USER_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: a tuple is unpacked, a dict gives keywords, a tensor is passed.

    Raises:
        CaptureError: the batch is of another kind.
    """
    if isinstance(batch, torch.Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*batch)
    raise CaptureError(
        f"a batch is a tensor, a tuple of arguments or a dict of keywords, not "
        f"{type(batch).__name__}: wrap it accordingly"
    )


def loss_of(output: Any, batch: Any, loss: Loss | None) -> torch.Tensor:
    """The scalar loss of a model's output: ``loss(output, batch)``, ``.loss`` or the output.

    Raises:
        CaptureError: there is no scalar, or it does not depend on a parameter.
    """
    if loss is not None:
        value = loss(output, batch)
    elif isinstance(output, Mapping) and output.get("loss") is not None:
        value = output["loss"]
    else:
        value = getattr(output, "loss", output)
    if not isinstance(value, torch.Tensor):
        raise CaptureError(
            f"the model returns {type(output).__name__}, which holds no loss: return a scalar "
            "loss, an object with .loss, or pass loss=function(output, batch)"
        )
    if value.numel() != 1 or not value.is_floating_point():
        raise CaptureError(
            f"the loss is not a scalar but {value.dtype} of shape {tuple(value.shape)}: reduce it "
            "with .mean(), or pass loss=function(output, batch)"
        )
    if not value.requires_grad:
        raise CaptureError(
            "the loss depends on no parameter that requires a gradient: there is nothing to train"
        )
    return value.reshape(())


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    Dynamo keeps what it has compiled with the code object, for a few variants at most: so that
    nothing stays behind in functions that others use, and models do not crowd each other out.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return types.FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )


def unbroken_by_logging(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Call a compiled function with logging calls left out of what Dynamo traces.

    A warning in the middle of a model would break its graph in two; the eager run before the
    capture has already issued it.
    """
    methods = {method for method in vars(logging.Logger).values() if callable(method)}

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(ignore_logging_functions=methods):
            return compiled(*args, **kwargs)

    return call


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Keep torch's modules from taking one opaque operation for a whole layer in inference."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore buffers and the random number generators afterwards."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn whatever the user's model raises into one line that says where it came from."""
    try:
        yield
    except TorchDynamoException as error:
        raise CaptureError(
            f"the model cannot be captured as one graph ({_first_line(error)}): remove the graph "
            "break, or use torch.compile(model, backend='precision'), which plans each piece"
        ) from error
    except _USER_FAILURES as error:
        raise CaptureError(
            f"the model fails on this batch ({type(error).__name__}: {_first_line(error)}): pass "
            "a batch that model(*batch) accepts"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
