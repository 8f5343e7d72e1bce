"""Differentiate a captured graph, forward and backward together, within a stated memory.

The joint graph is a straight line of operations. It is cut into chunks; each chunk is run under
autograd from leaves of its own, and the derivatives are handed from chunk to chunk. What autograd
saves of a chunk is either kept until its turn comes, or, where memory would not suffice, dropped
and made again by running the chunk a second time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import fx
from torch.autograd.graph import get_gradient_edge

from precision_compiler.adjoints import Adjoints, Known, derivatives, has_history, is_float
from precision_compiler.capture import Captured
from precision_compiler.chunks import Chunk, Phase, affordable, frugal, phases, saved_bytes
from precision_compiler.graph import contraction_rule, primals_and_tangents, reached_from, value_of
from precision_compiler.heap import SpareMemory
from precision_compiler.replay import draws, is_step, tangent_positions

Values = Callable[[fx.Node], Any]
"""Gives the value that a node has while a chunk runs."""


class Runner(Protocol):
    """Runs single nodes."""

    def reads(self, node: fx.Node) -> Iterable[fx.Node]:
        """Nodes whose values running ``node`` asks for."""
        ...

    def run(self, node: fx.Node, values: Values) -> Any:
        """The value of one node."""
        ...

    def constants(self) -> list[torch.Tensor]:
        """Tensors that depend on no leaf, yet are to be differentiated by; then forgotten."""
        ...


class Tape:
    """One run of a joint graph, and derivatives of it for several objectives at once."""

    def __init__(
        self,
        captured: Captured,
        runner: Runner,
        memory: float,
        seed: int = 0,
        roughly: bool = False,
        asked: Sequence[fx.Node] = (),
    ) -> None:
        """Cut the graph.

        Args:
            captured: graph, inputs and objective.
            runner: runs the nodes.
            memory: bytes that autograd may keep, about.
            seed: of random operations; a chunk that runs twice draws the same numbers.
            roughly: whether derivatives, not values, may be off by a few per cent where that
                makes them faster.
            asked: nodes that objectives other than the gradients and the loss may be about.
        """
        self.captured, self.runner, self.seed = captured, runner, seed
        self._roughly, self._asked = roughly, asked
        graph, joint = captured.joint.module.graph, captured.joint
        self.primals, self.tangents = primals_and_tangents(graph)
        results = graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        self.results = list(results[: joint.outputs])
        self.gradients = joint.goals
        steps = [node for node in graph.nodes if is_step(node)]
        self._sizes = {node: saved_bytes(node) for node in steps}
        own, ends = (_nodes(self.results), _nodes(self.gradients))
        forward, backward = phases(steps, own, self.tangents)
        read = {source for node in backward for source in node.all_input_nodes}
        dear = list(filter(_is_dear, steps))
        parts = (
            Phase(forward, [*read, *own, *ends, *dear], self._sizes),
            Phase(backward, [*own, *ends, *dear], self._sizes),
        )
        saved = self._sizes.values()
        self.forward, self.backward = frugal(parts, sum(saved), max(saved, default=0))
        self.kept = affordable(self.chunks, memory)
        self._connect()
        self.values: dict[fx.Node, Any] = {}
        self._heap = SpareMemory(expected=memory)
        self._given = set(self.primals)  # what no derivative is asked of, and constant tangents
        self._objective: tuple[list[Any], list[torch.Tensor], torch.Tensor] | None = None

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks in the order they run."""
        return [*self.forward, *self.backward]

    def record(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run everything; return the loss and the results whose error counts.

        These are gradients, or the outputs of an inference graph, which has no loss: it is 0.
        """
        self.values = dict(zip(self.primals, self.captured.joint.inputs, strict=True))
        for chunk in self.forward:
            self._advance(chunk)
        inference = self.captured.joint.inference
        loss = torch.zeros(()) if inference else self._run_objective()
        for chunk in self.backward:
            self._advance(chunk)
        return loss, [self.values[node] for node in self.gradients]

    def differentiate(
        self,
        probes: Mapping[str, Sequence[torch.Tensor]],
        arrived: Callable[[str], None],
        finished: Callable[[Chunk], None],
        others: Mapping[str, Sequence[fx.Node]] | None = None,
    ) -> None:
        """Run the derivatives of every objective through the graph, from its end.

        Args:
            probes: per objective, what each gradient is multiplied with, asked for when its turn
                comes; an objective without probes is the loss itself.
            arrived: called with the objective before hooks fire for it.
            finished: called when no further derivative can reach what a chunk computed.
            others: for objectives that are not about the gradients, the nodes that they are about.
        """
        known = others or {}
        adjoints = {name: Adjoints(probe) for name, probe in probes.items()}
        for name, probe in probes.items():
            nodes = known.get(name, self.gradients)
            for index, node in enumerate(nodes) if len(probe) else ():
                adjoints[name].seeds.setdefault(node, []).append(index)
        for chunk in reversed(self.backward):
            self._retreat(chunk, adjoints, arrived)
            finished(chunk)
        if self._objective is not None:
            self._through_objective(adjoints, [name for name in probes if not len(probes[name])])
        for chunk in reversed(self.forward):
            self._retreat(chunk, adjoints, arrived)
            finished(chunk)

    def seed_numbers(self, chunk: Chunk) -> None:
        """Have torch draw the numbers that a chunk draws whenever it runs."""
        torch.manual_seed(self.seed + self.chunks.index(chunk))

    def _connect(self) -> None:
        made_in: dict[fx.Node, Chunk] = {}
        results = [*self.results, *self.gradients, *self._asked]
        given: dict[int, dict[fx.Node, None]] = {id(chunk): {} for chunk in self.chunks}
        for chunk in self.chunks:
            made_in.update(dict.fromkeys(chunk.nodes, chunk))
        for chunk in self.chunks:
            reads: dict[fx.Node, None] = {}
            for node in chunk.nodes:
                reads.update(dict.fromkeys(self.runner.reads(node)))
            chunk.reads = [node for node in reads if made_in.get(node) is not chunk]
            for node in chunk.reads:
                if node in made_in:
                    given[id(made_in[node])][node] = None
        for node in results:
            if node in made_in:
                given[id(made_in[node])][node] = None
        for chunk in self.chunks:
            if id(chunk) not in self.kept:
                given[id(chunk)].update(dict.fromkeys(filter(_is_dear, chunk.nodes)))
            chunk.gives = list(given[id(chunk)])

    def _advance(self, chunk: Chunk) -> None:
        with torch.set_grad_enabled(id(chunk) in self.kept):
            made = self._execute(chunk)
        self.values.update((node, _still(value)) for node, value in made.items())
        self._heap.trim()

    def _execute(self, chunk: Chunk) -> dict[fx.Node, Any]:
        self.seed_numbers(chunk)
        found: dict[fx.Node, Any] = {}
        recording = torch.is_grad_enabled()
        for node in chunk.reads:
            value = _still(self.values[node])
            if recording and is_float(value) and node not in self._given:
                chunk.leaves[node] = value.requires_grad_()
            found[node] = value
        for node in chunk.nodes:
            with self._known(node) if recording else nullcontext():
                found[node] = self.runner.run(node, found.__getitem__)
        made = {node: found[node] for node in chunk.gives}
        if recording:
            edges = {n: get_gradient_edge(v) for n, v in made.items() if has_history(v)}
            chunk.made, chunk.constants = edges, self.runner.constants()
        return made

    def _known(self, node: fx.Node) -> AbstractContextManager[Any]:
        """In the second run of a chunk: what the first one left is not computed again."""
        value = self.values.get(node)
        if draws(node) or not isinstance(value, torch.Tensor) or not self._sizes[node]:
            return nullcontext()  # what draws has to move on the source of random numbers
        return Known(node.target, value)

    def _run_objective(self) -> torch.Tensor:
        with torch.enable_grad():
            leaves = [self._result(node) for node in self.results]
            loss = self.captured.objective(lambda: leaves)
            wanted = [leaves[index] for index in self._tangent_positions()]
            found = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        tangents = [
            torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
            if tangent is None  # of a result that the loss does not depend on
            else tangent
            for tangent, like in zip(found, wanted, strict=True)
        ]
        self._objective = leaves, tangents, loss
        for node, tangent in zip(self.tangents, tangents, strict=True):
            self.values[node] = tangent.detach()
            if not tangent.requires_grad:
                self._given.add(node)
        return loss.detach()

    def _tangent_positions(self) -> list[int]:
        floats = [node for node in self.primals if is_float(self.values[node])]
        moved = reached_from(floats) if floats else set()
        known = [node in moved for node in self.results]
        return tangent_positions(self.results, known, len(self.tangents))

    def _result(self, node: Any) -> Any:
        value = _still(self.values[node]) if isinstance(node, fx.Node) else node
        return value.requires_grad_() if is_float(value) else value

    def _through_objective(self, adjoints: Mapping[str, Adjoints], of_loss: Sequence[str]) -> None:
        assert self._objective is not None
        leaves, tangents, loss = self._objective
        nodes = [node for node, leaf in zip(self.results, leaves, strict=True) if is_float(leaf)]
        inputs = [leaf for leaf in leaves if is_float(leaf)]
        for name, known in adjoints.items():
            outputs = [
                (get_gradient_edge(tangent), known.take(node))
                for node, tangent in zip(self.tangents, tangents, strict=True)
                if node in known and has_history(tangent)
            ]
            if name in of_loss and has_history(loss):
                outputs.append((get_gradient_edge(loss), torch.ones_like(loss)))
            for node, value in zip(nodes, derivatives(outputs, inputs), strict=True):
                if value is not None:
                    known.add(node, value)

    def _retreat(
        self,
        chunk: Chunk,
        adjoints: Mapping[str, Adjoints],
        arrived: Callable[[str], None],
    ) -> None:
        active = [name for name, known in adjoints.items() if any(n in known for n in chunk.gives)]
        if active and id(chunk) not in self.kept:
            with torch.enable_grad():
                self._execute(chunk)
        for node in chunk.gives:  # the graph of autograd has what derivatives need of them
            self.values.pop(node, None)
        inputs = [*chunk.leaves.values(), *chunk.constants]
        for name in active:
            known = adjoints[name]
            reached = [node for node in chunk.made if node in known]
            outputs = [(chunk.made[node], known.take(node)) for node in reached]
            arrived(name)
            retain = name != active[-1]
            found = derivatives(outputs, inputs, retain, self._roughly, chunk.nodes)
            for node, value in zip(chunk.leaves, found, strict=False):
                if value is not None:
                    known.add(node, value)
        chunk.leaves, chunk.made, chunk.constants = {}, {}, []
        self._heap.trim()


def _is_dear(node: fx.Node) -> bool:
    """Whether running a node twice costs more than keeping its result."""
    return contraction_rule(node) is not None and value_of(node) is not None


def _nodes(results: Sequence[Any]) -> list[fx.Node]:
    return [node for node in results if isinstance(node, fx.Node)]


def _still(value: Any) -> Any:
    """The value without its history."""
    return value.detach() if isinstance(value, torch.Tensor) else value
