"""Chunked derivatives against one run of autograd over the same operations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge

from precision_compiler.adjoints import derivatives
from precision_compiler.attention import substitutes
from precision_compiler.capture import Captured
from precision_compiler.chunks import CHUNKS, Chunk, Phase, phases, saved_bytes
from precision_compiler.graph import CONVERT, contraction_rule
from precision_compiler.replay import Replay, execute, gradients_of, relative_error
from precision_compiler.tape import Tape, Values
from tests.helpers import graph, joint_of
from tests.models import MODELS, captured

AMPLE = inf
DETERMINISTIC = [name for name in MODELS if name != "dropout"]

Derivatives = dict[tuple[str, fx.Node], Tensor]


class Watching:
    """Runs nodes as they are; keeps what they gave and every derivative that arrives there."""

    def __init__(self) -> None:
        self.objective = ""
        self.results: dict[fx.Node, list[Any]] = {}
        self.derivatives: Derivatives = {}
        self.closed: set[fx.Node] = set()
        self._formulas, self._constants = substitutes(), list[Tensor]()

    def reads(self, node: fx.Node) -> Iterable[fx.Node]:
        return node.all_input_nodes

    def run(self, node: fx.Node, values: Values) -> Any:
        args: Any = fx.node.map_arg(node.args, values)
        kwargs: Any = fx.node.map_arg(node.kwargs, values)
        return self.call(node, args, kwargs)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target in self._formulas:
            value = self._formulas[node.target](lambda inner: inner, *args, **kwargs)
        elif node.target is CONVERT:
            value = args[0].to(args[1])
        else:
            value = execute(node, args, kwargs)
        self.results.setdefault(node, []).append(value)
        if torch.is_grad_enabled() and node.op == "call_function" and is_float(value):
            if not value.requires_grad:
                self._constants.append(value.requires_grad_())
            value.register_hook(partial(self._arrived, node))
        return value

    def constants(self) -> list[Tensor]:
        found, self._constants = self._constants, []
        return found

    def turn_to(self, objective: str) -> None:
        self.objective = objective

    def _arrived(self, node: fx.Node, adjoint: Tensor) -> None:
        assert node not in self.closed
        assert (self.objective, node) not in self.derivatives  # one derivative, in total
        self.derivatives[self.objective, node] = adjoint.detach().clone()


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def signs(gradients: Sequence[Tensor]) -> list[Tensor]:
    dice = torch.Generator().manual_seed(5)
    return [torch.randn(value.shape, generator=dice) for value in gradients]


@dataclass(frozen=True)
class Taped:
    """A tape after it is differentiated, and what it gave."""

    tape: Tape
    runner: Watching
    loss: Tensor
    gradients: list[Tensor]


def differentiated(found: Captured, memory: float, roughly: bool = False) -> Taped:
    """Both objectives at once; a chunk that is finished has nothing more to come."""
    runner, finished = Watching(), list[Chunk]()

    def finish(chunk: Chunk) -> None:
        finished.append(chunk)
        runner.closed.update(chunk.nodes)
        assert not set(chunk.gives) & set(tape.values)
        assert [*chunk.leaves, *chunk.made, *chunk.constants] == []

    with torch.random.fork_rng():
        tape = Tape(found, runner, memory, seed=3, roughly=roughly)
        loss, gradients = tape.record()
        given = {node for chunk in tape.chunks for node in chunk.gives}
        assert set(tape.values) == {*tape.primals, *tape.tangents, *given}
        probes: dict[str, Sequence[Tensor]] = {"gradient": signs(gradients), "loss": []}
        tape.differentiate(probes, runner.turn_to, finish)
    assert finished == tape.chunks[::-1]
    return Taped(tape, runner, loss, gradients)


@cache
def taped(name: str, memory: float) -> Taped:
    return differentiated(captured(name), memory)


@cache
def by_autograd(name: str) -> tuple[Derivatives, Tensor, list[Tensor]]:
    """The same derivatives from one graph that autograd keeps as a whole."""
    found, runner = captured(name), Watching()
    joint = found.joint
    leaves = [v.detach().requires_grad_() if is_float(v) else v for v in joint.inputs]
    replay = Replay(joint.module, leaves, joint.outputs, runner.call)
    results = [v.view_as(v) if is_float(v) else v for v in replay.forward()]  # no one by another
    loss = found.objective(lambda: results)
    tangents = torch.autograd.grad(
        loss,
        replay.tangents_needed(results),
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    gradients = [value for value in replay.backward(tangents) if value is not None]
    nodes = [node for node, values in runner.results.items() if is_float(values[0])]
    inputs = [runner.results[node][0] for node in nodes]
    moved = [(g, s) for g, s in zip(gradients, signs(gradients), strict=True) if g.requires_grad]
    runner.turn_to("unused")
    derivatives: Derivatives = {}
    for objective, outputs in {"gradient": moved, "loss": [(loss, torch.tensor(1.0))]}.items():
        runner.derivatives.clear()
        values, seeds = zip(*outputs, strict=True)
        adjoints = torch.autograd.grad(values, inputs, seeds, retain_graph=True, allow_unused=True)
        derivatives |= {
            (objective, node): adjoint
            for node, adjoint in zip(nodes, adjoints, strict=True)
            if adjoint is not None
        }
    return derivatives, loss.detach(), [gradient.detach() for gradient in gradients]


def assert_close(
    found: Derivatives, expected: Derivatives, within: float, noise: float = 1e-10
) -> None:
    """Both know the same places; what only one of them knows is zero.

    A derivative that is zero by structure, as that of softmax by its shift, is noise in both.
    """
    assert len(expected) > 20
    noise *= max(float(value.double().norm()) for value in expected.values())
    for key in {**found, **expected}:
        one, other = found.get(key), expected.get(key)
        if one is None or other is None:
            known = one if one is not None else other
            assert known is not None
            assert not known.any(), key
        else:
            distance = (one.double() - other.double()).norm()
            assert distance <= max(within * float(other.double().norm()), noise), key


@pytest.mark.parametrize("memory", [AMPLE, 0.0])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_derivatives_are_those_of_autograd_over_the_whole_graph(name: str, memory: float) -> None:
    expected, loss, gradients = by_autograd(name)
    found = taped(name, memory)
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(found.gradients, gradients) < 1e-6
    assert_close(found.runner.derivatives, expected, 2e-6)


@pytest.mark.parametrize("memory", [AMPLE, 0.0])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_rough_derivatives_are_off_by_a_few_per_cent_and_values_not_at_all(
    name: str, memory: float
) -> None:
    exact, found = taped(name, memory), differentiated(captured(name), memory, roughly=True)
    assert torch.equal(found.loss, exact.loss)
    assert all(map(torch.equal, found.gradients, exact.gradients))
    assert_close(found.runner.derivatives, exact.runner.derivatives, 0.05, 1e-4)


def modes_of(roughly: bool, fail: bool = False) -> list[str]:
    """The modes of float32 products, by device, while a derivative is computed."""
    backends: Any = torch.backends
    x, seen = torch.ones(2, requires_grad=True), list[str]()

    def note(_gradient: Tensor) -> None:
        seen.extend(one.matmul.fp32_precision for one in (backends.mkldnn, backends.cuda))
        if fail:
            raise ValueError("asked to fail")

    y = x * 2
    y.register_hook(note)  # type: ignore[no-untyped-call]
    derivatives([(get_gradient_edge(y), torch.ones(2))], [x], roughly=roughly)
    return seen


def test_only_rough_derivatives_use_fast_products_and_leave_the_modes_as_they_were() -> None:
    before = modes_of(roughly=False)
    assert modes_of(roughly=True) == ["bf16", "tf32"] != before
    assert modes_of(roughly=False) == before
    with pytest.raises(ValueError, match="asked to fail"):
        modes_of(roughly=True, fail=True)
    assert modes_of(roughly=False) == before


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradients_are_those_of_the_graph(name: str) -> None:
    loss, gradients = gradients_of(captured(name))
    for memory in (AMPLE, 0.0):
        assert taped(name, memory).loss == pytest.approx(loss.item(), rel=1e-5)
        assert relative_error(taped(name, memory).gradients, gradients) < 1e-5


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_without_memory_all_that_is_differentiated_runs_twice(name: str) -> None:
    ample, tiny = taped(name, AMPLE), taped(name, 0.0)
    assert_close(tiny.runner.derivatives, ample.runner.derivatives, 1e-6)
    assert [chunk.nodes for chunk in tiny.tape.chunks] == [c.nodes for c in ample.tape.chunks]
    assert len(ample.tape.kept) == len(ample.tape.chunks)
    assert all(len(values) == 1 for values in ample.runner.results.values())
    for _, node in tiny.runner.derivatives:
        if saved_bytes(node):
            assert len(tiny.runner.results[node]) == 2
    for node, values in tiny.runner.results.items():
        if len(values) == 2 and is_float(values[0]):
            assert torch.equal(*values)
            if contraction_rule(node) is not None:  # not computed a second time
                assert values[0].data_ptr() == values[1].data_ptr()


def test_what_only_the_backward_pass_reads_is_computed_right_before_it() -> None:
    module = graph(
        "x:f32[32,32] tangents_1:f32[32,32] | m = relu x | a = mul x x | b = neg m"
        " | g@backward = mul tangents_1 a | h@backward = mul g b | return a h"
    )
    nodes = {node.name: node for node in module.graph.nodes}
    steps = [node for node in module.graph.nodes if node.op == "call_function"]
    forward, backward = phases(steps, [nodes["a"]], [nodes["tangents_1"]])
    assert [node.name for node in forward] == ["a"]
    assert [node.name for node in backward] == ["g", "m", "b", "h"]


def test_dropout_draws_the_same_masks_in_both_runs_of_a_chunk() -> None:
    found = captured("dropout")
    total = sum(map(saved_bytes, found.joint.module.graph.nodes))
    half, ample = taped("dropout", total / 5), taped("dropout", AMPLE)
    assert [chunk.nodes for chunk in half.tape.chunks] == [c.nodes for c in ample.tape.chunks]
    drawn = [
        values
        for node, values in half.runner.results.items()
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        and is_float(values[0])
    ]
    assert len(drawn) == 2
    for masks in drawn:
        assert len(masks) == 2
        assert torch.equal(*masks)
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert 0 < len(half.tape.kept) < len(half.tape.chunks)
    assert torch.equal(half.loss, ample.loss)
    assert_close(half.runner.derivatives, ample.runner.derivatives, 1e-6)


@pytest.mark.parametrize("memory", [AMPLE, 1e5, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_the_graph_in_order_with_tuples_whole(name: str, memory: float) -> None:
    found = captured(name)
    tape = Tape(found, Watching(), memory)
    steps = [node for node in found.joint.module.graph.nodes if node.op == "call_function"]
    nodes = [node for chunk in tape.chunks for node in chunk.nodes if node.op == "call_function"]
    assert sorted(nodes, key=steps.index) == steps
    assert all(chunk.nodes == sorted(chunk.nodes, key=nodes.index) for chunk in tape.chunks)
    place = {node: index for index, chunk in enumerate(tape.chunks) for node in chunk.nodes}
    for node in nodes:
        if not isinstance(node.meta["val"], Tensor):
            assert {place[user] for user in node.users} <= {place[node]}
        assert all(place.get(source, -1) <= place[node] for source in node.all_input_nodes)
    assert len(tape.chunks) <= CHUNKS + 2
    kept = sum(chunk.saved_bytes for chunk in tape.chunks if id(chunk) in tape.kept)
    assert kept <= memory


def test_readers_of_a_tuple_stay_with_it_however_far_they_are() -> None:
    module = graph(
        "x:f32[32,32] | v = var_mean.correction x [1] correction=1 keepdim=true | a = relu x"
        " | b = mul a a | m = getitem v 1 | c = sub b m | s = getitem v 0 | d = mul c s | return d"
    )
    joint = replace(joint_of(module), inputs=[torch.ones(32, 32)])
    tape = Tape(Captured(joint, lambda forward: forward()[0].sum(), ""), Watching(), 0.0)
    assert [[node.name for node in chunk.nodes] for chunk in tape.chunks] == [
        ["v", "a", "b", "m", "c", "s"],
        ["d"],
    ]


@pytest.mark.parametrize("memory", [AMPLE, 0.0])
def test_results_that_are_gradients_tangents_and_constants_at_once(memory: float) -> None:
    """Loss <a, a> / 2 with a = x^2, tangent t = a; gradients g = 3 t x twice, and t itself."""
    module = graph(
        "x:f32[32,32] tangents_1:f32[32,32] | a = mul x x | c@backward = full_like tangents_1 3.0"
        " | g@backward = mul tangents_1 x | h@backward = mul g c | return a h h tangents_1"
    )
    x = torch.linspace(-1, 1, 1024).reshape(32, 32)
    joint = replace(joint_of(module, outputs=1), inputs=[x])
    found = differentiated(Captured(joint, lambda f: f()[0].square().sum() / 2, ""), memory)
    assert torch.equal(found.loss, (x**2).square().sum() / 2)
    for one, other in zip(found.gradients, (3 * x**3, 3 * x**3, x**2), strict=True):
        assert torch.allclose(one, other)
    first, second, third = signs(found.gradients)
    known = {(key, node.name): value for (key, node), value in found.runner.derivatives.items()}
    expected = {
        ("gradient", "h"): first + second,
        ("gradient", "g"): 3 * (first + second),
        ("gradient", "c"): x**3 * (first + second),
        ("gradient", "a"): 3 * x * (first + second) + third,
        ("loss", "a"): x**2,
    }
    assert set(known) == set(expected)
    for key, value in expected.items():
        assert torch.allclose(known[key], value, atol=1e-5), key


@pytest.mark.parametrize("memory", [AMPLE, 0.0])
def test_constant_tangents_are_no_leaves_and_absent_ones_take_no_memory(memory: float) -> None:
    """Loss sum a, with a = x^2, b = 3 x: tangents s = 1 and t = 0; gradient g = 2 s x + 3 t."""
    module = graph(
        "x:f32[32,32] tangents_1:f32[32,32] tangents_2:f32[32,32] | a = mul x x | b = mul x 3.0"
        " | c@backward = mul tangents_1 x | d@backward = mul c 2.0"
        " | e@backward = mul tangents_2 3.0 | g@backward = add d e | return a b g"
    )
    x = torch.linspace(-1, 1, 1024).reshape(32, 32)
    joint = replace(joint_of(module, outputs=2), inputs=[x])
    found = Captured(joint, lambda forward: forward()[0].sum(), "")
    runner = Watching()
    tape = Tape(found, runner, memory)
    _, gradients = tape.record()
    assert torch.equal(gradients[0], 2 * x)
    absent = tape.values[tape.tangents[1]]
    assert torch.equal(absent, torch.zeros(32, 32))
    assert absent.untyped_storage().nbytes() == 4
    leaves = {node for chunk in tape.chunks for node in chunk.leaves}
    probes: dict[str, Sequence[Tensor]] = {"gradient": signs(gradients)}
    tape.differentiate(probes, runner.turn_to, lambda chunk: leaves.update(chunk.leaves))
    assert not leaves & set(tape.tangents)
    (probe,) = signs(gradients)
    known = {node.name: value for (_, node), value in runner.derivatives.items()}
    assert torch.allclose(known["d"], probe)
    assert torch.allclose(known["c"], 2 * probe)


def test_chunks_end_where_little_crosses_and_what_does_is_counted_once() -> None:
    module = graph(
        "x:f32[32,32] | a = relu x | m = mm a a | b = mul m m | c = mul b b | d = mul c b"
        " | e = mul d d | return e"
    )
    nodes = {node.name: node for node in module.graph.nodes}
    steps = [node for node in module.graph.nodes if node.op == "call_function"]
    sizes = dict.fromkeys(steps, 4096)
    phase = Phase(steps, [nodes["e"], nodes["m"]], sizes)
    cut = phase.cut(4096)
    names = [[node.name for node in chunk.nodes] for chunk in cut]
    assert names == [["a", "m"], ["b", "c", "d"], ["e"]]
    single = [Chunk([node], 4096) for node in steps]
    # b is read twice, m and the result are kept anyway
    assert phase.between(single) == 4 * 4096
    assert phase.between(cut) == 4096
