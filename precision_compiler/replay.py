"""Run a captured graph on real values, operation by operation."""

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from precision_compiler.capture import Captured
from precision_compiler.errors import AnalysisError
from precision_compiler.graph import aten, primals_and_tangents, reached_from, value_of

Execute = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]

_INSTEAD: dict[Any, Any] = {
    # The strides of recomputed or substituted tensors can differ from the traced ones.
    aten.view.default: aten.reshape.default,
    # A primitive that autograd has no formula for.
    torch.ops.prims.rev.default: aten.flip.default,
}


def execute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one node as it stands; writes to the user's buffers are left out."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    if node.target is aten.copy_.default:
        return args[1]
    return _INSTEAD.get(node.target, node.target)(*args, **kwargs)


def is_step(node: fx.Node) -> bool:
    """Whether running a graph has something to do at the node."""
    return node.op in ("call_function", "get_attr")


class Replay:
    """One run of a joint graph: the forward results first, then the gradients.

    Tangents are bound between the two, so the loss may lie outside the graph.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        outputs: int,
        run: Execute = execute,
        only: Collection[int] | None = None,
    ) -> None:
        graph = module.graph
        self._run = run
        primals, self._tangents = primals_and_tangents(graph)
        self.values: dict[fx.Node, Any] = dict(zip(primals, inputs, strict=True))
        later = reached_from(self._tangents) if self._tangents else set()
        results = graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        self._results, self._gradients = results[:outputs], results[outputs:]
        if only is not None:
            there = [node for node in self._gradients if node is not None]
            self._gradients = [there[position] for position in sorted(only)]
        wanted = {n for n in (*self._results, *self._gradients) if isinstance(n, fx.Node)}
        random = {n for n in graph.nodes if draws(n)}  # all, so that each draws the same numbers
        needed = set(graph.nodes) if only is None else _with_sources(wanted | random)
        steps = [node for node in graph.nodes if is_step(node) and node in needed]
        self._forward = [node for node in steps if node not in later]
        self._backward = [node for node in steps if node in later]
        self._last = _last_uses([*self._forward, *self._backward], wanted)

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
        known = [isinstance(v, torch.Tensor) and v.requires_grad for v in results]
        chosen = tangent_positions(self._results, known, len(self._tangents))
        return [results[position] for position in chosen]

    def _value(self, node: Any) -> Any:
        return self.values[node] if isinstance(node, fx.Node) else node

    def _execute(self, steps: Sequence[fx.Node]) -> None:
        for node in steps:
            args = fx.node.map_arg(node.args, self._value)
            kwargs = fx.node.map_arg(node.kwargs, self._value)
            self.values[node] = self._run(node, args, kwargs)
            for spent in self._last.get(node, ()):
                del self.values[spent]


def draws(node: fx.Node) -> bool:
    """Whether a node takes numbers from the source of random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _with_sources(wanted: set[fx.Node]) -> set[fx.Node]:
    """Nodes and everything they are computed from."""
    waiting, found = list(wanted), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _last_uses(steps: Sequence[fx.Node], wanted: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every step, the nodes that nothing reads after it: their memory can be used again."""
    last: dict[fx.Node, fx.Node] = {}
    for node in steps:
        last.update((source, node) for source in node.all_input_nodes if source not in wanted)
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        found.setdefault(node, []).append(source)
    return found


@torch.no_grad()
def gradients_of(
    captured: Captured,
    module: fx.GraphModule | None = None,
    inputs: Sequence[Any] | None = None,
    run: Execute = execute,
    only: Collection[int] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and parameter gradients of a joint graph run without Inductor.

    Of an inference graph, no loss (0) and its float outputs, which take the gradients' place.

    Args:
        captured: the graph, its inputs and its objective.
        module: a rewritten graph with the same inputs and results; the captured one by default.
        inputs: values in place of the captured ones, such as those of another batch.
        run: runs single operations.
        only: positions of the gradients to return, which nothing else is computed for.

    Returns:
        The loss and the gradients of the parameters, in the order of the inputs.
    """
    joint = captured.joint
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same dropout masks in every replay
        given = joint.inputs if inputs is None else inputs
        some = None if joint.inference else only
        replay = Replay(module or joint.module, given, joint.outputs, run, some)
        results = [_as_leaf(value) for value in replay.forward()]
        if joint.inference:
            floats = [value.detach() for value in results if _is_float(value)]
            return torch.zeros(()), floats if only is None else [floats[i] for i in sorted(only)]
        with torch.enable_grad():
            loss = captured.objective(lambda: results)
            wanted = replay.tangents_needed(results)
            tangents = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        found = replay.backward(tangents)
    return loss.detach(), [gradient for gradient in found if gradient is not None]


def tangent_positions(
    results: Sequence[Any], differentiable: Sequence[bool], tangents: int
) -> list[int]:
    """Positions of the forward results that a graph's tangents belong to.

    Args:
        results: the result nodes of the forward pass; absent ones are None.
        differentiable: which of them depend on something that is differentiated by.
        tangents: how many gradients the graph takes.

    Raises:
        AnalysisError: they cannot be told apart.
    """
    floats = [index for index, node in enumerate(results) if _holds_floats(node)]
    wanted = [index for index in floats if differentiable[index]]
    chosen = wanted if len(wanted) == tangents else floats
    if len(chosen) != tangents:
        raise AnalysisError(
            f"the graph takes {tangents} output gradients but has {len(chosen)} "
            "differentiable results: return each tensor once, detached from nothing"
        )
    return chosen


def _holds_floats(node: Any) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value is not None and value.is_floating_point()


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _as_leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if _is_float(value) else value


def relative_error(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """``||found - reference|| / ||reference||`` over all tensors together, summed in float64."""
    pairs = list(zip(found, reference, strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    return (difference / norm) ** 0.5 if norm else float("inf")
