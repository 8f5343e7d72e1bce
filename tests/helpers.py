"""Graphs as text, and units to run passes on, so that a test shows what it is about.

One line per graph: placeholders, then statements, separated by bars.

    x:f32[4,8] w:f32[8,8] | a = mm x w | b@backward = relu a | return a b

A statement's words are an ATen operation (``mm``, ``select.int``; ``cast`` for a change of dtype,
``getitem`` for an output) and its arguments: nodes, numbers, ``[lists]``, dtypes, ``none``,
``true``, ``false`` and ``key=value``. ``@backward`` puts a node into the backward pass.
"""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from precision_compiler.budget import Budget
from precision_compiler.graph import CONVERT, base_name, refresh
from precision_compiler.joint import JointGraph
from precision_compiler.journal import Journal
from precision_compiler.pipeline import Pass, Pipeline, Unit
from precision_compiler.problem import Problem
from precision_compiler.target import FormatRate, Target

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "b8": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False, **DTYPES}


def graph(text: str) -> fx.GraphModule:
    """The graph that a text describes, with fake values and partitioner tags."""
    heads, *lines = [part.strip() for part in text.replace("\n", " ").split("|")]
    built, mode = fx.Graph(), FakeTensorMode()
    nodes: dict[str, fx.Node] = {}
    for head in heads.split():
        name, dtype, shape = _placeholder(head)
        nodes[name] = built.placeholder(name)
        with mode:
            nodes[name].meta["val"] = torch.empty(shape, dtype=dtype)
    for line in lines:
        words = line.split()
        if words[0] == "return":
            built.output(tuple(_argument(word, nodes) for word in words[1:]))
            continue
        name, _, tag = words[0].partition("@")
        assert words[1] == "=", line
        nodes[name] = _call(built, name, words[2], words[3:], nodes)
        nodes[name].meta["partitioner_tag"] = f"is_{tag or 'forward'}"
    built.lint()
    return fx.GraphModule(torch.nn.Module(), built)


def _placeholder(word: str) -> tuple[str, torch.dtype, list[int]]:
    found = re.fullmatch(r"(\w+):(\w+)\[([\d,]*)\]", word)
    assert found is not None, word
    shape = [int(size) for size in found[3].split(",") if size]
    return found[1], DTYPES[found[2]], shape


def _call(
    built: fx.Graph, name: str, op: str, words: Sequence[str], nodes: Mapping[str, fx.Node]
) -> fx.Node:
    args = tuple(_argument(word, nodes) for word in words if "=" not in word)
    pairs = (word.split("=") for word in words if "=" in word)
    kwargs = {key: _argument(value, nodes) for key, value in pairs}
    node = built.create_node("call_function", _target(op), args, kwargs, name=name)
    assert node.name == name, f"{name} is a reserved word"
    refresh(node)
    return node


def _target(op: str) -> Any:
    if op in ("cast", "getitem"):
        return CONVERT if op == "cast" else operator.getitem
    packet, _, overload = op.partition(".")
    found = getattr(torch.ops.aten, packet)
    return getattr(found, overload) if overload else _usual_overload(found)


def _usual_overload(packet: Any) -> Any:
    """The overload that is meant when none is written."""
    return getattr(packet, "Tensor", None) or getattr(packet, "default", None)


def _argument(word: str, nodes: Mapping[str, fx.Node]) -> Any:
    if word in nodes:
        return nodes[word]
    if word in _WORDS:
        return _WORDS[word]
    if word.startswith("["):
        return [_argument(item, nodes) for item in word.strip("[]").split(",") if item]
    return float(word) if re.search(r"[.e]", word) else int(word)


def text(module: fx.GraphModule) -> str:
    """A graph in the words that ``graph`` reads."""
    parts: list[str] = []
    heads: list[str] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            shape = ",".join(map(str, value.shape))
            heads.append(f"{node.name}:{_NAMES[value.dtype]}[{shape}]")
        elif node.op == "output":
            parts.append(" ".join(["return", *map(_word, node.args[0])]))
        else:
            tag = "@backward" if node.meta.get("partitioner_tag") == "is_backward" else ""
            keys = [f"{key}={_word(value)}" for key, value in node.kwargs.items()]
            words = [f"{_word(node)}{tag}", "=", _op(node), *map(_word, node.args), *keys]
            parts.append(" ".join(words))
    return " | ".join([" ".join(heads), *parts])


def _op(node: fx.Node) -> str:
    if node.target is CONVERT:
        return "cast"
    name, target = base_name(node.target), node.target
    if not isinstance(target, torch._ops.OpOverload):
        return name
    usual = _usual_overload(target.overloadpacket)
    return name if target is usual else f"{name}.{target._overloadname}"


def _word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, torch.dtype):
        return _NAMES[value]
    if isinstance(value, fx.Node):  # casts that a pass inserted are cast, cast_1 and so on
        return value.name.replace("convert_element_type_default", "cast")
    return "none" if value is None else str(value).lower()


def joint_of(
    module: fx.GraphModule,
    parameters: Sequence[str] = (),
    outputs: int | None = None,
    saved: Sequence[str] = (),
) -> JointGraph:
    """A joint graph without input values; every result is a forward result by default."""
    holders = module.graph.find_nodes(op="placeholder")
    tangents = [node for node in holders if node.name.startswith("tangents")]
    names = [node.name for node in holders if node not in tangents]
    results = module.graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    count = len(results) if outputs is None else outputs
    return JointGraph(
        module, [], names, frozenset(parameters), count, frozenset(saved), inference=not tangents
    )


def unit_of(
    module: fx.GraphModule,
    assignment: Mapping[str, str] | None = None,
    target: Target | None = None,
    parameters: Sequence[str] = (),
) -> Unit:
    """A unit to rewrite, its assignment given by node: ``{"a": "bf16", "a.store": "bf16"}``.

    Every site that is not named is float32; a name that is no site is an error.
    """
    joint = joint_of(module, parameters)
    by_node = {
        site.node if site.kind == "contraction" else f"{site.node}.store": site.name
        for site in joint.sites
    }
    formats = dict.fromkeys((site.name for site in joint.sites), "fp32")
    for node, name in (assignment or {}).items():
        formats[by_node[node]] = name
    return Unit(joint, target, Budget.parse(1.0), Journal(), assignment=formats)


def bare_unit(problem: Problem, limit: float) -> Unit:
    """A unit around a problem that belongs to no graph."""
    unit = Unit(joint_of(graph("x:f32[2] | return x")), machine(), Budget.parse(1.0), Journal())
    unit.budget = replace(unit.budget, limit=limit)
    unit.__dict__["problem"] = problem
    return unit


def rewrite(module: fx.GraphModule, assignment: Mapping[str, str], *passes: Pass) -> Unit:
    """Run passes on a graph with an assignment by node, with the runner's checks."""
    unit = unit_of(module, assignment)
    Pipeline(passes, given=frozenset({"assignment", "casts"})).run(unit)
    return unit


def machine(**rates: float) -> Target:
    """A target with round numbers: 1 TB/s, 1 us per kernel, narrow formats 2 to 16 times faster."""
    flops = rates or {"fp32": 1e12, "tf32": 2e12, "bf16": 4e12, "fp16": 4e12, "e4m3": 16e12}
    formats = {name: FormatRate(rate, 1.0, "a test") for name, rate in flops.items()}
    return Target(
        "round", "numbers", "cpu", 1e12, 1.0, 1e-6, formats, "a test",
        cast_fraction=1.0, issue_seconds=1e-6,
    )  # fmt: skip
