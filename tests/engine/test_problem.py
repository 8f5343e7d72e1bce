"""How choices add up: seconds, casts, variances and legality, by hand."""

import numpy as np
import pytest

from precision_compiler.formats import FORMATS
from precision_compiler.links import Link, Links, find_links
from precision_compiler.problem import Prices, Problem, entry_format, fixes_result
from precision_compiler.sites import Site
from precision_compiler.statistics import Sensitivity, Statistics
from tests.helpers import graph, joint_of
from tests.models import MODELS, captured


def one(binade: int = 0) -> Sensitivity:
    """A weight of one on numbers from ``2**binade``."""
    weight = np.zeros(255)
    weight[126 + binade] = 1.0
    return Sensitivity(weight, 2.0**binade * 1.5)


def site(name: str, kind: str) -> Site:
    return Site(name, "storage" if kind == "s" else "contraction", "fprop", "mm", name, "", ())


@pytest.fixture
def problem() -> Problem:
    """X -> c1 -> s1 -> c2 and c3, which also reads s1 twice."""
    contractions = {name: site(name, "c") for name in ("c1", "c2", "c3")}
    reads = (
        Link("c1", 0, "x", None),
        Link("c2", 0, "s1", "s1"),
        Link("c3", 0, "s1", "s1"),
        Link("c3", 1, "s1", "s1"),
    )
    links = Links(contractions, {"s1": site("s1", "s")}, reads, {"c1": ("s1",), "c2": (), "c3": ()})
    formats = ("fp32", "tf32", "bf16", "fp16", "e4m3")
    options = {**dict.fromkeys(contractions, formats), "s1": ("fp32", "bf16", "fp16")}
    prices = Prices(
        dict.fromkeys(contractions, dict.fromkeys(formats, 100.0)),
        {"s1": {"fp32": 10.0, "bf16": 5.0, "fp16": 5.0}},
        dict.fromkeys(("x", "s1"), dict.fromkeys(FORMATS, 1.0)),
    )
    operands = {(link.contraction, link.argument): one() for link in reads}
    statistics = Statistics({"s1": one()}, operands, {"c3": (one(), one())}, 2.0, 1.0)
    return Problem(links, options, prices, statistics)


ULP = {name: 2.0 ** (2 * (1 - FORMATS[name].precision)) / 12 for name in FORMATS}


@pytest.mark.parametrize(
    ("formats", "casts", "seconds"),
    [
        (("fp32", "fp32", "fp32", "fp32"), set(), 310),
        (("tf32", "tf32", "tf32", "fp32"), set(), 310),  # read as float32 bits
        (("bf16", "bf16", "bf16", "bf16"), {("x", "bf16")}, 306),
        (("fp32", "bf16", "bf16", "fp32"), {("s1", "bf16")}, 311),  # one copy for three readings
        (("fp32", "bf16", "fp16", "fp32"), {("s1", "bf16"), ("s1", "fp16")}, 312),
        (("bf16", "fp32", "bf16", "bf16"), {("x", "bf16"), ("s1", "fp32")}, 307),
        (("fp32", "e4m3", "e4m3", "fp32"), {("s1", "e4m3")}, 311),
    ],
)
def test_copies_are_counted_and_paid_once(
    problem: Problem, formats: tuple[str, ...], casts: set[tuple[str, str]], seconds: float
) -> None:
    assignment = dict(zip(("c1", "c2", "c3", "s1"), formats, strict=True))
    assert problem.casts(assignment) == casts
    assert problem.seconds(assignment) == seconds


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (("fp32", "fp32", "fp32", "fp32"), {}),
        (("tf32", "fp32", "fp32", "fp32"), {"c1": ULP["tf32"]}),
        (("bf16", "fp32", "fp32", "bf16"), {"c1": ULP["bf16"], "s1": ULP["bf16"]}),
        # a tensor in bf16 is not rounded again on its way into bf16, fp16 or tf32
        (("fp32", "bf16", "fp32", "bf16"), {"s1": ULP["bf16"]}),
        (("fp32", "fp16", "fp32", "bf16"), {"s1": ULP["bf16"]}),
        (("fp32", "tf32", "fp32", "bf16"), {"s1": ULP["bf16"]}),
        (("fp32", "bf16", "fp32", "fp16"), {"s1": ULP["fp16"], "c2": ULP["bf16"]}),
        # both arguments and both intermediate results
        (("fp32", "fp32", "bf16", "fp32"), {"c3": 4 * ULP["bf16"]}),
        (("fp32", "fp32", "bf16", "bf16"), {"c3": 2 * ULP["bf16"], "s1": ULP["bf16"]}),
    ],
)
def test_variances_add_up(
    problem: Problem, formats: tuple[str, ...], expected: dict[str, float]
) -> None:
    assignment = dict(zip(("c1", "c2", "c3", "s1"), formats, strict=True))
    found = problem.variances(assignment)
    assert set(found) == {"c1", "c2", "c3", "s1"}
    for name, variance in found.items():
        assert variance == pytest.approx(expected.get(name, 0.0)), name
    assert problem.variance(assignment) == pytest.approx(sum(expected.values()))
    assert problem.error(assignment) == pytest.approx(sum(expected.values()) ** 0.5 / 2)


def test_result_follows_a_contraction_that_fixes_it(problem: Problem) -> None:
    legal = {"c1": "bf16", "c2": "fp32", "c3": "tf32", "s1": "bf16"}
    assert list(problem.violations(legal)) == []
    for stored in ("fp32", "fp16"):
        (reason,) = problem.violations(legal | {"s1": stored})
        assert reason == "s1 must be bf16, the format c1 returns"
    for free in ("fp32", "tf32", "e4m3"):
        assert not list(problem.violations(legal | {"c1": free, "s1": "fp16"}))
    (reason,) = problem.violations(legal | {"c2": "e5m2"})
    assert reason == "c2 may not be e5m2"


def test_uniform_assignment_names_every_site(problem: Problem) -> None:
    assert problem.uniform() == dict.fromkeys(("c1", "c2", "c3", "s1"), "fp32")
    assert set(problem.uniform("bf16").values()) == {"bf16"}


def test_formats_by_how_they_enter_and_leave_a_contraction() -> None:
    assert [name for name in FORMATS if fixes_result(name)] == ["fp32", "bf16", "fp16"]
    assert {name: entry_format(name) for name in FORMATS} == {
        **{name: name for name in FORMATS},
        "tf32": "fp32",
    }


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
