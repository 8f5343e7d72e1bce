"""Where a site lies, read from its name; groups of sites."""

import pytest

from precision_compiler.plan import SiteChoice
from precision_compiler.report.places import OUTSIDE, Place, groups_of, places_of, sections_of
from tests.made_plans import site
from tests.models import planned


def made(name: str) -> SiteChoice:
    last = name.rpartition(".")[2]
    if last == "store":
        return site("storage", "store", 0)
    return site("contraction", last if last in ("fprop", "dgrad", "wgrad") else "fprop", 0)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.3.fc.wgrad", Place("blocks.3", "fc", "wgrad")),
        ("blocks.3.fc.wgrad.store", Place("blocks.3", "fc", "wgrad kept")),
        ("blocks.3.attn.sdpa.dgrad.0.store", Place("blocks.3", "attn.sdpa", "dgrad kept")),
        ("blocks.3.add_1.store", Place("blocks.3", "add_1", "fprop kept")),
        ("blocks.3.gelu.mul.grad.store", Place("blocks.3", "gelu.mul", "dgrad kept")),
        ("model.layers.12.experts.3.up.fprop", Place("model.layers.12", "experts.3.up", "fprop")),
        ("0.wgrad", Place("0", "", "wgrad")),
        ("sdpa.fprop.0.store", Place("", "sdpa", "fprop kept")),
        ("head.dgrad", Place("", "head", "dgrad")),
        ("store.grad.embed.store", Place("", "store.grad.embed", "fprop kept")),
        ("fprop", Place("", "", "fprop")),
        ("", Place("", "", "fprop")),
    ],
)  # fmt: skip
def test_place_of(name: str, place: Place) -> None:
    assert places_of({name: made(name)}) == {name: place}


def test_the_number_of_a_layer_is_one_that_differs() -> None:
    """As in names of ONNX files: nothing is called `model.1`."""
    names = [f"model.0.encoder.layer.{layer}.fc.fprop" for layer in (0, 3)]
    places = places_of({name: made(name) for name in names})
    assert [place.layer for place in places.values()] == [
        "model.0.encoder.layer.0",
        "model.0.encoder.layer.3",
    ]
    assert {place.module for place in places.values()} == {"fc"}


def test_sections_are_layers_in_order_with_what_is_around_them() -> None:
    names = ("embed.store", "blocks.0.fc.fprop", "blocks.1.fc.fprop", "head.fprop",
             "head.dgrad", "blocks.1.fc.wgrad", "embed.grad.store", "add.grad.store")  # fmt: skip
    sections = sections_of({name: made(name) for name in names})
    assert [section.name for section in sections] == [OUTSIDE, "blocks.0", "blocks.1", OUTSIDE]
    assert sections[2].rows == {"fc": {"fprop": [2], "wgrad": [5]}}
    assert sections[3].rows["head"] == {"fprop": [3], "dgrad": [4]}


@pytest.mark.parametrize("by", ["layer", "op", "role"])
def test_groups_hold_every_site_once(by: str) -> None:
    sites = planned("gpt").sites
    groups = groups_of(sites, by)  # type: ignore[arg-type]
    assert sum(group.sites for group in groups) == len(sites)
    assert sum(sum(group.formats.values()) for group in groups) == len(sites)
    assert sum(group.seconds for group in groups) == pytest.approx(
        sum(choice.seconds for choice in sites.values())
    )
    assert len({group.name for group in groups}) == len(groups)


def test_groups_by_layer_and_role() -> None:
    sites = planned("gpt").sites
    assert {"blocks.0", "blocks.1", OUTSIDE} == {group.name for group in groups_of(sites, "layer")}
    roles = {"fprop", "dgrad", "wgrad", "store"}
    assert {group.name for group in groups_of(sites, "role")} == roles
