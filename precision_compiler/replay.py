"""Run a captured graph on real values, operation by operation."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from precision_compiler.capture import Captured
from precision_compiler.errors import AnalysisError
from precision_compiler.graph import aten, reached_from

Execute = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]

# The strides of recomputed or substituted tensors can differ from the traced ones.
_TOLERANT: dict[Any, Any] = {aten.view.default: aten.reshape.default}


def execute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one node as it stands."""
    target = _TOLERANT.get(node.target, node.target)
    return target(*args, **kwargs)


class Replay:
    """One run of a joint graph: the forward results first, then the gradients.

    Tangents are bound between the two, so the loss may lie outside the graph.
    """

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Any], outputs: int, run: Execute = execute
    ) -> None:
        graph = module.graph
        self._module, self._run = module, run
        holders = graph.find_nodes(op="placeholder")
        self._tangents = [node for node in holders if "tangents" in str(node.target)]
        primals = [node for node in holders if node not in self._tangents]
        self.values: dict[fx.Node, Any] = dict(zip(primals, inputs, strict=True))
        later = reached_from(self._tangents) if self._tangents else set()
        steps = [node for node in graph.nodes if node.op in ("call_function", "get_attr")]
        self._forward = [node for node in steps if node not in later]
        self._backward = [node for node in steps if node in later]
        results = graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        self._results, self._gradients = results[:outputs], results[outputs:]

    def forward(self) -> list[Any]:
        """Run everything that does not wait for tangents; return the forward results."""
        self._execute(self._forward)
        return [self._value(node) for node in self._results]

    def backward(self, tangents: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run the rest; return one gradient (or None) per input."""
        self.values.update(zip(self._tangents, tangents, strict=True))
        self._execute(self._backward)
        return [self._value(node) for node in self._gradients]

    def tangents_needed(self, results: Sequence[Any]) -> list[torch.Tensor]:
        """The forward results that the graph's tangents belong to.

        Raises:
            AnalysisError: they cannot be told apart.
        """
        floats = [
            value
            for value, node in zip(results, self._results, strict=True)
            if isinstance(node, fx.Node)
            and isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and node.meta["val"].requires_grad is not None
        ]
        wanted = [value for value in floats if value.requires_grad]
        chosen = wanted if len(wanted) == len(self._tangents) else floats
        if len(chosen) != len(self._tangents):
            raise AnalysisError(
                f"the graph takes {len(self._tangents)} output gradients but has {len(chosen)} "
                "differentiable results: return each tensor once, detached from nothing"
            )
        return chosen

    def _value(self, node: Any) -> Any:
        return self.values[node] if isinstance(node, fx.Node) else node

    def _execute(self, steps: Sequence[fx.Node]) -> None:
        for node in steps:
            if node.op == "get_attr":
                self.values[node] = operator.attrgetter(str(node.target))(self._module)
            elif node.target is not aten.copy_.default:  # buffers stay the user's
                args = fx.node.map_arg(node.args, self._value)
                kwargs = fx.node.map_arg(node.kwargs, self._value)
                self.values[node] = self._run(node, args, kwargs)
            else:
                self.values[node] = self._value(node.args[1])


@torch.no_grad()
def gradients_of(
    captured: Captured, module: fx.GraphModule | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and parameter gradients of a joint graph run without Inductor.

    Args:
        captured: the graph, its inputs and its objective.
        module: a rewritten graph with the same inputs and results; the captured one by default.

    Returns:
        The loss and the gradients of the parameters, in the order of the inputs.
    """
    joint = captured.joint
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same dropout masks in every replay
        replay = Replay(module or joint.module, joint.inputs, joint.outputs)
        results = [_as_leaf(value) for value in replay.forward()]
        with torch.enable_grad():
            loss = captured.objective(lambda: results)
            wanted = replay.tangents_needed(results)
            tangents = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        found = replay.backward(tangents)
    return loss.detach(), [gradient for gradient in found if gradient is not None]


def _as_leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def relative_error(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """``||found - reference|| / ||reference||`` over all tensors together, summed in float64."""
    pairs = list(zip(found, reference, strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    return (difference / norm) ** 0.5 if norm else float("inf")
