"""Casts between bf16 and fp16 by way of float32: every number the same, and no slow conversion."""

import re

import pytest
import torch
from torch import fx
from torch._inductor.utils import run_and_get_code

import precision_compiler
from precision_compiler.capture import capture
from precision_compiler.graph import is_cast
from precision_compiler.links import find_links
from precision_compiler.wide_casts import split_casts
from tests.helpers import graph
from tests.models import Mlp

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
CONVERSION = re.compile(r"auto (\w+) = \w+::(?:vec::)?convert<(?:at::)?(\w+)[^>]*>\((\w+)\);")


@pytest.mark.parametrize(("source", "goal"), [("bf16", "f16"), ("f16", "bf16")])
def test_all_codes_come_out_the_same(source: str, goal: str) -> None:
    described = f"x:{source}[65536] | a = cast x {goal} | return a"
    module = graph(described)
    assert split_casts(module.graph)
    module.graph.lint()
    module.recompile()
    assert [node.args[1] for node in casts(module)] == [torch.float32, DTYPES[goal]]
    codes = torch.arange(65536).to(torch.uint16).view(DTYPES[source])
    (found,) = module(codes)
    (expected,) = graph(described)(codes)
    is_number = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[is_number].view(torch.int16), expected[is_number].view(torch.int16))


def casts(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if is_cast(node)]


@pytest.mark.parametrize(("source", "goal"), [("bf16", "f32"), ("f32", "f16"), ("f64", "bf16")])
def test_other_casts_stay(source: str, goal: str) -> None:
    module = graph(f"x:{source}[8] | a = cast x {goal} | return a")
    assert not split_casts(module.graph)


def test_the_compiled_step_converts_between_them_by_way_of_float32() -> None:
    """Of tensors kept in one of the two and multiplied in the other; the code says so."""
    batch = (torch.randn(128, 64), torch.randn(128, 64))
    model = Mlp(64, 256)
    captured_here = capture(model, batch)
    links = find_links(captured_here.joint)
    chosen = dict.fromkeys(links.contractions, "fp16")
    chosen |= {name: "fp16" if name in links.writer else "bf16" for name in links.stores}
    plan = precision_compiler.make_plan(model, batch).with_formats(chosen)
    torch._dynamo.reset()
    compiled = precision_compiler.compile(model, plan=plan)
    _, codes = run_and_get_code(lambda: compiled(*batch).backward())
    assert any("at::BFloat16" in code and "at::Half" in code for code in codes)
    found = [pair for code in codes for pair in conversions(code)]
    assert ("float", "Half") in found
    assert not {("BFloat16", "Half"), ("Half", "BFloat16")} & set(found)


def conversions(code: str) -> list[tuple[str, str]]:
    """Types (before, after) of a code's conversions of what another conversion has made."""
    kinds: dict[str, str] = {}
    found = []
    for made, kind, read in CONVERSION.findall(code):
        kinds[made] = kind
        if read in kinds:
            found.append((kinds[read], kind))
    return found
