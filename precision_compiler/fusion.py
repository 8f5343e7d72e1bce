"""Ask Inductor which kernels it would make of a graph, without generating any code."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import shape_env_from_inputs
from torch._inductor.virtualized import V

from precision_compiler.graph import copied
from precision_compiler.joint import Part


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled graph.

    Attributes:
        nodes: names of the graph's nodes that it computes.
        reads: names of the nodes or inputs whose tensors it reads from memory.
        writes: names of the nodes whose tensors it writes.
        generated: whether Inductor generates it; otherwise it is a library call.
        backward: whether it belongs to the backward pass.
    """

    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    generated: bool
    backward: bool


def kernels_of(part: Part, *, inference: bool = False) -> tuple[Kernel, ...]:
    """The kernels of a forward or backward pass, in the order they run.

    Runs Inductor's own passes, lowering and scheduler on a copy of the graph (what its
    ``compile_fx_inner`` does up to code generation), so that fusion and the tensors that
    materialise are what they will be.

    Args:
        part: its graph and inputs.
        inference: whether there is no backward pass.
    """
    graph, inputs = copied(part.module), list(part.inputs)
    view_to_reshape(graph)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        mode = compile_fx.fake_tensor_prop(graph, inputs)
    compile_fx._recursive_record_original_output_strides(graph)
    with V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(graph, is_inference=inference)
        lowering = GraphLowering(
            graph,
            example_inputs=inputs,
            shape_env=shape_env_from_inputs(inputs),
            is_inference=inference,
            is_backward=part.backward,
        )
        lowering.freeze_runtime_asserts()
        with DebugContext(), V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            return tuple(_kernels(lowering, part.backward))


def _kernels(lowering: GraphLowering, backward: bool) -> Iterator[Kernel]:
    name_of = _namer(lowering)
    for scheduled in lowering.scheduler.nodes:
        if isinstance(scheduled, NopKernelSchedulerNode):
            continue
        parts = scheduled.get_nodes()
        written = [output for part in parts for output in part.get_outputs()]
        made = {output.get_name() for output in written}
        kept = [output for output in written if _outlives(output, parts)]
        reads = {dep.name for dep in scheduled.read_writes.reads} - made
        origins = (part.node.get_origins() for part in parts if part.node is not None)
        yield Kernel(
            tuple(sorted({origin.name for found in origins for origin in found})),
            tuple(sorted({name_of(name) for name in reads})),
            tuple(sorted({name_of(output.get_name()) for output in kept})),
            not scheduled.is_extern(),
            backward,
        )


def _outlives(output: Any, parts: Sequence[BaseSchedulerNode]) -> bool:
    """Whether a buffer is read outside of the kernel that makes it, or a result of the graph."""
    inside = {part.get_name() for part in parts}
    return any(user.get_name() not in inside for user in output.users)


def _namer(lowering: GraphLowering) -> Callable[[str], str]:
    """Buffers and inputs by the graph node whose tensor they hold."""

    def name_of(buffer: str) -> str:
        found = lowering.name_to_buffer.get(buffer)
        origin = found.get_origin_node() if found is not None else None
        return origin.name if origin is not None else buffer

    return name_of
