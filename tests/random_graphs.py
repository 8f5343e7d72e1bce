"""Random small graphs with random assignments, and what they must compute, worked out slowly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from precision_compiler.emulation import quantise
from precision_compiler.formats import FORMATS
from precision_compiler.graph import contraction_rule, is_float32, is_movement, root_of
from precision_compiler.links import find_links
from precision_compiler.problem import fixes_result
from tests.helpers import graph, joint_of

SIDE = 32  # 32 by 32 elements is where a tensor counts as stored
HEAD = f"x:f32[{SIDE},{SIDE}] w:f32[{SIDE},{SIDE}] v:f32[{SIDE}]"


@dataclass
class Writer:
    """Statements written so far, and what there is to read."""

    draw: st.DrawFn
    squares: list[str] = field(default_factory=lambda: ["x", "w"])
    lines: list[str] = field(default_factory=list)

    def pick(self) -> str:
        """A square tensor, the latest ones more often."""
        return self.draw(st.sampled_from(self.squares + self.squares[-2:]))

    def write(self, statement: str, keep: bool = True) -> str:
        """Add a statement; its name, which later ones read if ``keep``."""
        name = f"n{len(self.lines)}"
        self.lines.append(f"{name} = {statement}")
        if keep:
            self.squares.append(name)
        return name

    def step(self, kind: str) -> None:
        """Add the statements of one kind of step."""
        a, half = self.pick(), SIDE // 2
        if kind in ("mm", "mul", "add"):
            self.write(f"{kind} {a} {self.pick()}")
        elif kind in ("relu", "neg", "t", "clone"):
            self.write(f"{kind} {a}")
        elif kind == "addmm":
            self.write(f"addmm v {a} {self.pick()}")
        elif kind == "narrow":  # the model's own change of dtype, there and back
            narrow = self.write(f"cast {a} {self.draw(st.sampled_from(['bf16', 'f16']))}", False)
            self.write(f"cast {narrow} f32")
        elif kind == "halves":  # two slices of one tensor, one of which meets a contraction
            first = self.write(f"slice.Tensor {a} 0 0 {half}", False)
            second = self.write(f"slice.Tensor {a} 0 {half} {SIDE}", False)
            self.write(f"cat [{first},{second}]")
            self.write(f"mm {first} {self.pick()}", False)
        elif kind == "slice":
            first = self.write(f"slice.Tensor {a} 1 0 {half}", False)
            turned = self.write(f"t {first}", False)
            self.write(f"mm {first} {turned}")
        elif kind == "bmm":
            one = self.write(f"unsqueeze {a} 0", False)
            two = self.write(f"expand {one} [2,{SIDE},{SIDE}]", False)
            three = self.write(f"bmm {two} {two}", False)
            self.write(f"select.int {three} 0 1")
        else:  # a reduction that is put back into the running
            row = self.write(f"sum.dim_IntList {a} [1] true", False)
            self.write(f"sub.Tensor {a} {row}")


KINDS = (
    *("mm", "mm", "mm", "addmm", "mul", "add", "relu", "neg", "t", "clone"),
    *("narrow", "halves", "slice", "bmm", "sum"),
)


@st.composite
def graph_texts(draw: st.DrawFn, most: int = 8, kinds: Sequence[str] = KINDS) -> str:
    """Text of a graph whose unread nodes are its results."""
    writer = Writer(draw)
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most)):
        writer.step(kind)
    words = " ".join(line.replace("[", " ").replace(",", " ") for line in writer.lines)
    names = [line.split()[0] for line in writer.lines]
    unread = [name for name in names if words.replace("]", " ").split().count(name) == 1]
    extra = draw(st.sampled_from(names))
    results = [*unread, *([extra] if extra not in unread else [])]
    return " | ".join([HEAD, *writer.lines, f"return {' '.join(results)}"])


@st.composite
def assignments(draw: st.DrawFn, described: str, formats: Sequence[str]) -> dict[str, str]:
    """A legal assignment by node: results of bf16 and fp16 contractions are kept as such."""
    joint = joint_of(graph(described))
    links = find_links(joint)
    chosen: dict[str, str] = {}
    for name, site in links.contractions.items():
        chosen[site.node] = draw(st.sampled_from(formats))
        for store in links.results[name]:
            own = chosen[site.node]
            kept = own if fixes_result(own) and own != "fp32" else draw(_STORES)
            chosen[f"{links.stores[store].node}.store"] = kept
    for site in links.stores.values():
        chosen.setdefault(f"{site.node}.store", draw(_STORES))
    return chosen


_STORES = st.sampled_from(["fp32", "bf16", "fp16"])


@st.composite
def rewrites(
    draw: st.DrawFn, formats: Sequence[str] = ("fp32", "bf16", "fp16"), most: int = 8
) -> tuple[str, dict[str, str]]:
    """Text of a graph and an assignment by node."""
    described = draw(graph_texts(most))
    return described, draw(assignments(described, formats))


def inputs_of(module: fx.GraphModule, seed: int = 0) -> list[Tensor]:
    """Random values for a graph's placeholders, small enough for fp16 after some products."""
    generator = torch.Generator().manual_seed(seed)
    holders = module.graph.find_nodes(op="placeholder")
    return [
        torch.randn(node.meta["val"].shape, generator=generator) / SIDE**0.5 for node in holders
    ]


def emulated(described: str, assignment: Mapping[str, str]) -> list[Tensor]:
    """Results of a graph under an assignment, node by node, every value in float32.

    A float32 tensor is rounded to its contraction's result format, then to its storage format; a
    contraction rounds what it reads to its own format. This is the definition of an assignment.
    """
    module = graph(described)
    emulation = _Emulation(module, assignment)
    return emulation.run()


class _Emulation:
    def __init__(self, module: fx.GraphModule, assignment: Mapping[str, str]) -> None:
        self.graph, self.assignment = module.graph, assignment
        holders = module.graph.find_nodes(op="placeholder")
        self.values: dict[fx.Node, Tensor] = dict(zip(holders, inputs_of(module), strict=True))

    def run(self) -> list[Tensor]:
        for node in self.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._stored(node, self._computed(node))
        results = self.graph.output_node().args[0]
        assert isinstance(results, tuple)
        return [self.values[node] for node in results if isinstance(node, fx.Node)]

    def _computed(self, node: fx.Node) -> Tensor:
        fmt = self.assignment.get(node.name)
        if fmt in (None, "fp32"):
            return self._call(node, self.values)
        found = dict(self.values)
        rule = contraction_rule(node)
        assert rule is not None
        for index in (*rule.operands, *(rule.companions if fixes_result(str(fmt)) else ())):
            argument = node.args[index]
            assert isinstance(argument, fx.Node)
            found[argument] = self._read(argument, str(fmt))
        return self._call(node, found).float()

    def _read(self, argument: fx.Node, fmt: str) -> Tensor:
        """A contraction's argument in its format: the tensor behind it rounded as a whole."""
        root = root_of(argument)
        whole = self.values[root]
        dtype = FORMATS[fmt].dtype
        rounded = whole.to(dtype) if fixes_result(fmt) and dtype else quantise(whole, fmt)
        return self._shown(argument, root, rounded)

    def _shown(self, node: fx.Node, root: fx.Node, value: Tensor) -> Tensor:
        if node is root:
            return value
        parent = node.args[0]
        assert isinstance(parent, fx.Node)
        return self._call(node, {parent: self._shown(parent, root, value)})

    def _stored(self, node: fx.Node, value: Tensor) -> Tensor:
        if not is_float32(node) or is_movement(node):
            return value
        kept = self.assignment.get(f"{node.name}.store", "fp32")
        dtype = FORMATS[kept].dtype
        assert dtype is not None
        return value.to(dtype).float()

    @staticmethod
    def _call(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor:
        args = fx.node.map_arg(node.args, lambda read: values[read])
        assert callable(node.target)
        result = node.target(*args, **node.kwargs)
        assert isinstance(result, Tensor)
        return result
