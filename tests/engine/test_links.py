"""Links between contractions and the stored tensors they read and write."""

import pytest

from precision_compiler.links import Link, find_links
from tests.helpers import graph, joint_of
from tests.models import MODELS, captured


def test_links_look_past_views_and_into_outputs() -> None:
    links = find_links(
        joint_of(
            graph(
                "x:f32[32,32] q:f32[1,2,16,32] | a = relu x | b = t a | c = mm b x"
                " | d = _scaled_dot_product_flash_attention_for_cpu q q q | e = getitem d 0"
                " | f = view e [32,32] | g = mm f c | return g"
            )
        )
    )
    kept = {found.node: name for name, found in links.stores.items()}
    names = {found.node: name for name, found in links.contractions.items()}
    assert links.reads_of(names["c"]) == [
        Link(names["c"], 0, "a", kept["a"]),
        Link(names["c"], 1, "x", None),
    ]
    assert links.reads_of(names["g"]) == [
        Link(names["g"], 0, "e", kept["e"]),
        Link(names["g"], 1, "c", kept["c"]),
    ]
    assert links.results[names["d"]] == (kept["e"],)
    assert links.writer[kept["e"]] == names["d"]


@pytest.mark.parametrize(
    "op", ["addmm b x w", "baddbmm d e e", "convolution i k b [1] [0] [1] false [0] 1"]
)
def test_added_bias_is_a_companion_and_what_is_multiplied_is_not(op: str) -> None:
    joint = joint_of(
        graph(
            "x:f32[32,32] w:f32[32,32] b:f32[32] d:f32[2,32,32] e:f32[2,32,32] i:f32[2,32,32]"
            f" k:f32[32,32,3] | c = {op} | return c"
        )
    )
    (site,) = find_links(joint).contractions
    found = {link.argument: link.companion for link in find_links(joint).reads_of(site)}
    added = 2 if op.startswith("conv") else 0
    assert found == {index: index == added for index in range(3)}


@pytest.mark.parametrize("name", MODELS)
def test_links_of_models_point_at_sites_and_nodes(name: str) -> None:
    joint = captured(name).joint
    links = find_links(joint)
    nodes = {node.name for node in joint.module.graph.nodes}
    for link in links.reads:
        assert link.contraction in links.contractions
        assert link.source in nodes
        assert link.store is None or links.stores[link.store].node == link.source
    assert set(links.results) == set(links.contractions)
    assert set(links.writer) == {store for stores in links.results.values() for store in stores}
