"""The joint forward and backward graph that Inductor compiles, and how to get hold of it.

Inductor itself produces the graph: ``compile_fx`` runs with a stub in place of code generation
and our hook at ``joint_custom_pre_pass``, so what is analysed here is what is compiled later.
Passes that the user has put there run before it, both times.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes
from torch._subclasses import FakeTensor

from precision_compiler.errors import CaptureError
from precision_compiler.graph import copied, primals_and_tangents, value_of
from precision_compiler.sites import Site, find_sites
from precision_compiler.sizes import size_hint


@dataclass(frozen=True)
class Part:
    """The forward or the backward pass by itself, as Inductor compiles it.

    Attributes:
        module: its graph; nodes keep the joint graph's names.
        inputs: fake values of its placeholders.
        backward: which of the two it is.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    backward: bool


@dataclass
class JointGraph:
    """One graph as Inductor's joint hook sees it, with the values of its inputs.

    Attributes:
        module: the graph; forward and backward together unless ``inference``.
        inputs: real values of the ``primals`` placeholders, in order.
        names: a human name for each of them: dotted parameter name or input name.
        parameters: names of the placeholders that are parameters.
        saved: names of the nodes that Inductor's partitioner keeps for the backward pass.
        outputs: number of results of the forward pass.
        inference: whether there is no backward pass.
        parts: the graphs that Inductor's partitioner makes of it.
    """

    module: fx.GraphModule
    inputs: list[Any]
    names: list[str]
    parameters: frozenset[str]
    outputs: int
    saved: frozenset[str] = frozenset()
    inference: bool = False
    parts: tuple[Part, ...] = ()
    _sites: tuple[Site, ...] | None = field(default=None, repr=False)

    @staticmethod
    def of(module: fx.GraphModule, names: list[str], parameters: list[bool]) -> "JointGraph":
        """Describe a graph at the joint hook, without values of its inputs.

        Args:
            module: the graph.
            names: human name of every input.
            parameters: which inputs are parameters.
        """
        primals, tangents = primals_and_tangents(module.graph)
        if len(primals) != len(names):
            raise CaptureError(
                f"the graph has {len(primals)} inputs but the model was called with {len(names)}: "
                "pass tensors that do not share memory"
            )
        results = module.graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        weights = frozenset(
            node.name for node, known in zip(primals, parameters, strict=True) if known
        )
        outputs = len(results) - (len(primals) if tangents else 0)
        return JointGraph(module, [], names, weights, outputs, inference=not tangents)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The decision points; finding them names the graph's nodes."""
        if self._sites is None:
            self._sites = find_sites(self.module.graph, self.parameters, self.saved)
        return self._sites

    @property
    def has_values(self) -> bool:
        """Whether the graph can be run: not if its inputs have sizes alone."""
        return not any(isinstance(value, FakeTensor) for value in self.inputs)

    @property
    def goals(self) -> list[fx.Node]:
        """The results whose error counts: gradients, or all float results of an inference graph."""
        results = self.module.graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        if self.inference:
            return [node for node in results if isinstance(node, fx.Node) and _is_float(node)]
        return [node for node in results[self.outputs :] if isinstance(node, fx.Node)]

    @property
    def goal_names(self) -> list[str]:
        """Human names of these: of the inputs that gradients belong to, or ``output_0`` and on."""
        results = self.module.graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        if self.inference:
            return [f"output_{index}" for index, node in enumerate(results) if _is_float(node)]
        return self._owners(self.names)

    @property
    def goal_holders(self) -> list[str]:
        """Names of the placeholders that the gradients of a training graph belong to."""
        return self._owners([node.name for node in primals_and_tangents(self.module.graph)[0]])

    def _owners(self, labels: Sequence[str]) -> list[str]:
        """Of labels of all inputs, those of inputs that there is a gradient of."""
        results = self.module.graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        pairs = zip(labels, results[self.outputs :], strict=True)
        return [label for label, node in pairs if isinstance(node, fx.Node)]

    @property
    def parameter_values(self) -> dict[str, torch.Tensor]:
        """Values of the parameters by the name of their placeholder."""
        primals, _ = primals_and_tangents(self.module.graph)
        pairs = zip(primals, self.inputs, strict=True)
        return {node.name: value for node, value in pairs if node.name in self.parameters}

    def inputs_with(self, values: Mapping[str, torch.Tensor]) -> list[Any]:
        """The inputs with other values in some places.

        Args:
            values: by the name of the placeholder.
        """
        primals, _ = primals_and_tangents(self.module.graph)
        pairs = zip(primals, self.inputs, strict=True)
        return [values.get(node.name, value) for node, value in pairs]

    def with_inputs(self, values: Sequence[Any]) -> "JointGraph":
        """The same graph, not copied, with the values of another batch."""
        inputs = [size_hint(v) if isinstance(v, torch.SymInt) else v for v in values]
        return JointGraph(
            self.module, inputs, self.names, self.parameters, self.outputs,
            self.saved, self.inference, self.parts, self.sites,
        )  # fmt: skip

    def copy(self) -> "JointGraph":
        """The same with a graph of its own, to be rewritten."""
        return JointGraph(
            copied(self.module), self.inputs, self.names, self.parameters, self.outputs,
            self.saved, self.inference, self.parts, self._sites,
        )  # fmt: skip


def _is_float(node: object) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value is not None and value.is_floating_point()


class _Hook(CustomGraphPass):
    """Calls a function with the graph at Inductor's joint hook; never cached."""

    def __init__(self, action: Callable[[fx.GraphModule], None]) -> None:
        self.action = action

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None
        self.action(module)

    def uuid(self) -> None:
        return None


def trace_joint(module: fx.GraphModule, inputs: Sequence[Any]) -> JointGraph:
    """Run Inductor up to code generation on a Dynamo graph and keep its joint graph.

    Args:
        module: the graph Dynamo hands to a backend (copied, not changed).
        inputs: the real values of its placeholders.
    """
    names = input_names(module)
    seen: list[fx.GraphModule] = []
    saved: list[str] = []
    parts: list[Part] = []

    def keep(joint: fx.GraphModule) -> None:
        seen.append(copied(joint))

    def stub(part: fx.GraphModule, given: Sequence[Any], **options: Any) -> Any:
        backward = bool(options.get("is_backward"))
        if not backward:
            saved.extend(node.name for node in part.graph.output_node().all_input_nodes)
        parts.append(Part(part, tuple(given), backward))
        return _Boxed(part)

    patches = after_own_passes("joint_custom_pre_pass", _Hook(keep)) | {"fx_graph_cache": False}
    now = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with torch._functorch.config.patch(now):
        compile_fx(copied(module), list(inputs), inner_compile=stub, config_patches=patches)
    joint = JointGraph.of(seen[0], names, [isinstance(value, nn.Parameter) for value in inputs])
    joint.inputs = [size_hint(v) if isinstance(v, torch.SymInt) else v for v in inputs]
    joint.saved, joint.parts = frozenset(saved), tuple(parts)
    return joint


def after_own_passes(setting: str, ours: CustomGraphPass) -> dict[str, Any]:
    """A setting of Inductor: the graph passes that the user has put there, and ours behind."""
    return {setting: [*get_custom_graph_passes(getattr(torch._inductor.config, setting)), ours]}


class _Boxed:
    """A compiled-function stand-in that runs a graph module."""

    _boxed_call = True

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def __call__(self, inputs: list[Any]) -> Any:
        return self.module(*inputs)


def input_names(module: fx.GraphModule) -> list[str]:
    """Dotted parameter name or input name of every placeholder of a Dynamo graph."""
    return [_input_name(node) for node in module.graph.find_nodes(op="placeholder")]


def _input_name(node: fx.Node) -> str:
    """``L['model']._modules['fc']._parameters['weight']`` -> ``fc.weight``."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    text = source.name if source is not None else node.name
    text = text if isinstance(text, str) else text()
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']*)'\]", text)
    if parts:
        return ".".join(parts)
    words = re.findall(r"[A-Za-z0-9_]+", re.sub(r"^[LG]", "", text))
    return "_".join(words) or node.name
