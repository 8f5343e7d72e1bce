"""Names of decision points: what people expect, and stable."""

import fnmatch

import pytest
import torch
from torch import Tensor, nn

from precision_compiler.capture import capture, capture_inference
from precision_compiler.joint import JointGraph
from precision_compiler.sites import (
    Site,
    by_name,
    find_sites,
    fingerprint,
    matching,
    named_nodes,
    output_nodes,
)
from tests.helpers import graph, joint_of
from tests.models import MODELS, Case, captured, gpt, handwritten, llama, made, mlp, vit


def joint(name: str) -> JointGraph:
    return captured(name).joint


def joint_graph(case: Case) -> JointGraph:
    return capture(case.model, case.batch, case.loss).joint


def contractions(found: JointGraph) -> list[str]:
    return [site.name for site in found.sites if site.kind == "contraction"]


def of_linear(path: str, data: bool = True) -> set[str]:
    """Sites of a linear layer; the first of a network has no gradient for its input."""
    roles = ("fprop", "dgrad", "wgrad") if data else ("fprop", "wgrad")
    return {f"{path}.{role}" for role in roles}


def test_mlp_has_the_five_products_of_two_layers() -> None:
    assert set(contractions(joint("mlp"))) == of_linear("up", data=False) | of_linear("down")


def test_gpt_names_layers_attention_and_tied_head() -> None:
    expected: set[str] = of_linear("linear")  # the head belongs to no module but the model
    for block in ("blocks.0", "blocks.1"):
        for layer in ("attn.qkv", "attn.out", "fc", "proj"):
            expected |= of_linear(f"{block}.{layer}")
        expected |= {f"{block}.attn.sdpa.fprop", f"{block}.attn.sdpa.dgrad"}
    assert set(contractions(joint("gpt"))) == expected


def test_llama_names_every_projection() -> None:
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    expected = set().union(*(of_linear(layer) for layer in layers)) | {"sdpa.fprop", "sdpa.dgrad"}
    assert set(contractions(joint("llama"))) == expected


def test_explicit_attention_has_two_products_each_with_two_gradients() -> None:
    found = [name for name in contractions(joint("explicit")) if name.startswith("matmul")]
    assert sorted(found) == [
        "matmul.1.dgrad", "matmul.dgrad", "matmul.fprop",
        "matmul_1.1.dgrad", "matmul_1.dgrad", "matmul_1.fprop",
    ]  # fmt: skip


class Reused(nn.Module):
    """A layer that is called twice, and another whose name is the first one's second call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc_1, self.linear = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.raw = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc_1(self.fc(self.fc(x).relu()).relu())
        y: Tensor = self.linear(x) @ self.raw @ self.raw
        return y.square().mean()


def test_names_stay_apart_where_layers_are_called_twice() -> None:
    names = contractions(joint_graph(Case(Reused(), torch.randn(8, 16))))
    assert len(set(names)) == len(names) == 3 * 6 - 1
    assert {"fc.fprop", "fc_1.fprop", "fc_1_1.fprop"} <= set(names)


def test_vit_names_the_convolution() -> None:
    found = [name for name in contractions(joint("vit")) if name.startswith("patch")]
    assert found[0] == "patch.fprop"
    assert len(found) == 2  # pixels want no gradient


def test_roles_of_raw_parameters_are_found_from_the_graph_alone() -> None:
    assert set(contractions(joint("handwritten"))) == of_linear("linear", data=False) | of_linear(
        "linear_1"
    )


class Disguised(nn.Module):
    """A linear layer by the name of an attention, and its weight turned and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        half = x @ (self.table.T * 2)
        return torch.einsum("bi,oi->bo", half.relu(), self.table).square().mean()


def test_scaled_and_shared_parameters_count_as_weights() -> None:
    found = joint_graph(Case(Disguised(), torch.randn(32, 16)))
    assert set(contractions(found)) == of_linear("linear", data=False) | of_linear("linear_1")


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique_and_spelled_for_globs(name: str) -> None:
    sites = joint(name).sites
    names = [site.name for site in sites]
    assert len(set(names)) == len(names)
    for site in sites:
        assert site.name.endswith(f".{site.role}")
        assert fnmatch.fnmatchcase(site.name, site.name)
        assert " " not in site.name
    assert set(by_name(sites)) == set(names)


@pytest.mark.parametrize("name", MODELS)
def test_every_node_that_computes_has_its_own_name(name: str) -> None:
    found = joint(name)
    assert found.sites
    named = named_nodes(found.module.graph)
    nodes = set(named.values())
    assert len(nodes) == len(named)
    for site in found.sites:
        own = site.name if site.kind == "contraction" else site.name.removesuffix(".store")
        assert named[own].name == site.node


@pytest.mark.parametrize("name", MODELS)
def test_finding_sites_twice_finds_the_same(name: str) -> None:
    found = joint(name)
    assert find_sites(found.module.graph, found.parameters, found.saved) == found.sites


@pytest.mark.parametrize("make", [mlp, gpt, llama, vit, handwritten])
def test_names_and_fingerprint_do_not_depend_on_the_batch(make: object) -> None:
    assert callable(make)
    small, large = joint_graph(make(batch=4)), joint_graph(make(batch=9))
    assert contractions(small) == contractions(large)
    assert [site.signature for site in small.sites if site.kind == "contraction"] == [
        site.signature for site in large.sites if site.kind == "contraction"
    ]
    assert fingerprint(small.sites) == fingerprint(large.sites)


def test_fingerprint_tells_widths_apart() -> None:
    prints = [
        fingerprint(joint_graph(case).sites)
        for case in (mlp(hidden=64), mlp(hidden=96), gpt(width=32), gpt(width=64))
    ]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("name", MODELS)
def test_inference_names_are_forward_names_of_training(name: str) -> None:
    case = made(name)
    found = capture_inference(case.model, case.batch)
    assert found.inference
    forward = {site for site in contractions(joint(name)) if site.endswith(".fprop")}
    assert set(contractions(found)) == forward
    signatures = {site.name: site.signature for site in joint(name).sites}
    for site in found.sites:
        if site.kind == "contraction":
            assert signatures[site.name] == site.signature


def stores(text: str, parameters: tuple[str, ...] = ()) -> list[str]:
    """Nodes of a text's storage sites."""
    sites = joint_of(graph(text), parameters).sites
    return [site.node for site in sites if site.kind == "storage"]


def test_tensor_read_or_written_by_a_contraction_is_stored() -> None:
    text = "x:f32[32,32] | a = relu x | b = neg a | c = mm b b | d = relu c | return d"
    assert stores(text) == ["b", "c"]


def test_tensor_read_beyond_a_contraction_is_stored() -> None:
    text = "x:f32[32,32] | a = relu x | b = neg a | c = mm b b | d = add c a | return d"
    assert stores(text) == ["a", "b", "c"]


def test_tensor_read_through_views_is_stored() -> None:
    text = "x:f32[32,32] | a = relu x | b = t a | c = mm b x | return c"
    assert stores(text) == ["a", "c"]


def test_small_tensors_reductions_and_other_dtypes_are_no_storage_sites() -> None:
    text = (
        "x:f32[32,32] s:f32[8,8] n:bf16[32,32] | a = relu s | b = mm a a"
        " | c = sum.dim_IntList x [1] true | d = expand c [32,32] | e = mm d x"
        " | f = relu n | g = mm f f | return b e g"
    )
    assert stores(text) == ["b", "e"]


def test_tensor_saved_for_the_backward_pass_is_stored() -> None:
    text = "x:f32[32,32] | a = relu x | b = neg a | return b"
    module = graph(text)
    saved = joint_of(module, saved=["a"]).sites
    assert [site.node for site in saved] == ["a"]


def test_sites_hold_float32_contractions_only() -> None:
    text = "x:f32[4,4] h:bf16[4,4] | a = mm x x | b = mm h h | return a b"
    sites: tuple[Site, ...] = joint_of(graph(text)).sites
    assert [site.node for site in sites if site.kind == "contraction"] == ["a"]


def test_outputs_of_fused_attention_are_its_results_not_its_normaliser() -> None:
    module = graph(
        "q:f32[1,2,16,32] | a = _scaled_dot_product_flash_attention_for_cpu q q q"
        " | o = getitem a 0 | l = getitem a 1 | return o l"
    )
    by_node = {node.name: node for node in module.graph.nodes}
    assert output_nodes(by_node["a"]) == [by_node["o"]]
    assert [site.node for site in joint_of(module).sites] == ["a", "o"]


def test_globs_match_whole_names() -> None:
    names = ["blocks.0.fc.fprop", "blocks.0.fc.wgrad", "head.fprop"]
    assert matching("blocks.*.fprop", names) == names[:1]
    assert matching("*", names) == names
    assert matching("fc", names) == []
