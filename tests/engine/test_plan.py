"""Plan files: exact round trips, and a clear word about anything else."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_compiler.compiler import make_plan
from precision_compiler.errors import PlanError
from precision_compiler.files import write_atomically
from precision_compiler.formats import FORMATS
from precision_compiler.plan import Plan, SiteDifference
from tests.helpers import machine
from tests.models import made, planned
from tests.random_plans import plans


@settings(max_examples=100, deadline=None, derandomize=True)
@given(plans)
def test_round_trip_is_exact(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert list(again.sites) == list(plan.sites)
    assert again.to_json() == plan.to_json()


def test_round_trip_of_a_real_plan_through_a_file(tmp_path: Path) -> None:
    plan = planned("mlp")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.assignment == {name: choice.format for name, choice in plan.sites.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plans_from_before_trials_calibrated_can_be_read() -> None:
    record = json.loads(planned("mlp").to_json())
    assert record["totals"].pop("calibrated") is None
    record["trial"] = {"seconds": {"plan": 0.5}, "winner": "plan", "sentence": "why"}
    plan = Plan.from_json(json.dumps(record))
    assert plan.totals.calibrated_seconds is None
    assert plan.trial is not None
    assert plan.trial.calibrated is None


@pytest.mark.parametrize("scale", [1e4, 3e5])
def test_plan_that_overflows_on_a_held_out_batch_can_be_read_again(scale: float) -> None:
    """What is measured then is infinite or undefined, which JSON has no word for."""
    case = made("mlp")
    x, y = case.batch
    plan = make_plan(
        case.model,
        (x, y),
        target=machine(fp32=1e12, fp16=4e12),
        budget=0.05,
        held_out=(x * scale, y),
    )
    assert plan.verification is not None
    assert plan.verification.rounds > 1
    assert Plan.from_json(plan.to_json()) == plan


def test_file_is_json_that_people_can_read(tmp_path: Path) -> None:
    planned("mlp").save(tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["schema_version"] == 4
    assert set(record) == {field.name for field in dataclasses.fields(Plan)}


@pytest.mark.parametrize("seed", range(200))
def test_flipped_bytes_are_an_error_or_another_valid_plan(seed: int) -> None:
    dice = random.Random(seed)
    text = bytearray(_small_plan().to_json().encode())
    for _ in range(dice.choice([1, 1, 1, 2, 10])):
        place = dice.randrange(len(text))
        action = dice.randrange(4)
        if action == 0:
            text[place] ^= 1 << dice.randrange(8)
        elif action == 1:
            text[place] = dice.choice(b'0123456789{}[]",:-eEnulltrue\n \\')
        elif action == 2:
            del text[place : place + dice.choice([1, 1, 5, 1000])]
        else:
            text[place:place] = dice.choice([b"\xff", b"\x00", b"1", b"null", b"{}", b'"', b"[["])
    _error_or_plan(bytes(text))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_other_json_in_any_place_is_an_error_or_a_valid_plan(data: st.DataObject) -> None:
    record = json.loads(_small_plan().to_json())
    place: Any = record
    while True:
        key = data.draw(
            st.sampled_from(list(place) if isinstance(place, dict) else range(len(place)))
        )
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        place = inner
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "replace":
        place[key] = data.draw(st.recursive(leaves, lambda inner: st.lists(inner, max_size=2)))
    elif action == "remove":
        del place[key]
    elif isinstance(place, dict):
        place["unheard of"] = 1
    _error_or_plan(json.dumps(record).encode())


def _small_plan() -> Plan:
    plan = planned("handwritten")
    return dataclasses.replace(
        plan,
        sites=dict(list(plan.sites.items())[:2]),
        nodes=plan.nodes[:1],
        journal=plan.journal[:1],
    )


def _error_or_plan(text: bytes) -> None:
    """Either one line about the file, or a plan that means what a second reading says."""
    try:
        plan = Plan.from_json(text, "plan.json")
    except PlanError as error:
        message = str(error)
    else:
        assert Plan.from_json(plan.to_json()) == plan
        assert all(choice.format in FORMATS for choice in plan.sites.values())
        return
    assert message.startswith("plan.json ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not a plan"),
        (b"[]", "is not a plan"),
        (b"3", "is not a plan"),
        (b"null", "is not a plan"),
        (b"{}", "has schema version None, this program reads 4"),
        (b'{"schema_version": 1}', "has schema version 1, this program reads 4"),
        (b'{"schema_version": 4}', "is corrupt at target: Field required"),
        (b"\x89PNG\r\n", "is not a plan"),
        (b"\xff\xfe\x00", "is not a plan"),
        (b'{"schema_version": 4, "target": NaN}', "is not a plan (the number NaN is not finite)"),
        (b'{"schema_version": 4, "a": 1e999}', "is not a plan (the number 1e999 is not finite)"),
        (b"[" * 100_000, "is not a plan"),
        (b'{"schema_version": 4, "target": ' + b"[" * 100_000, "is not a plan"),
    ],
)
def test_no_plan_is_a_plan_error(text: bytes, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, "it")
    assert f"it {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_format_is_named_with_its_site() -> None:
    record = json.loads(planned("mlp").to_json())
    record["sites"]["up.fprop"]["format"] = "fp7"
    with pytest.raises(PlanError, match=r"gives up\.fprop the unknown format 'fp7'"):
        Plan.from_json(json.dumps(record))


def test_missing_file_and_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the plan .*absent.*No such file"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match=r"cannot write the plan .*No such file"):
        planned("mlp").save(tmp_path / "no folder" / "plan.json")
    with pytest.raises(PlanError, match="cannot write the plan"):
        planned("mlp").save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    planned("mlp").save(path)
    old = path.read_bytes()

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(PlanError, match="No space left on device"):
        planned("gpt").save(path)
    assert path.read_bytes() == old
    assert [item.name for item in tmp_path.iterdir()] == ["plan.json"]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")  # half a character: fails while writing
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["text"]


def test_saved_file_has_the_rights_of_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    planned("mlp").save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def changed(plan: Plan, formats: dict[str, str | None]) -> Plan:
    """The plan with other formats; None removes a site."""
    kept = dict(plan.sites)
    for name, fmt in formats.items():
        if fmt is None:
            kept.pop(name)
        else:
            template = kept.get(name, next(iter(kept.values())))
            kept[name] = dataclasses.replace(template, format=fmt)
    return dataclasses.replace(plan, sites=kept)


def test_difference_lists_changed_missing_and_new_sites_in_order() -> None:
    one = changed(planned("mlp"), dict.fromkeys(planned("mlp").sites, "fp32"))
    names = list(one.sites)
    other = changed(one, {names[2]: "bf16", names[0]: None, "extra": "fp16"})
    assert one.diff(one) == ()
    assert one.diff(other) == (
        SiteDifference(names[0], "fp32", None),
        SiteDifference(names[2], "fp32", "bf16"),
        SiteDifference("extra", None, "fp16"),
    )
    assert {(d.site, d.after, d.before) for d in other.diff(one)} == {
        (d.site, d.before, d.after) for d in one.diff(other)
    }


def test_digest_depends_on_decisions_alone() -> None:
    plan = planned("mlp")
    told = dataclasses.replace(plan, target="another", loss_origin="elsewhere", journal=())
    assert told.digest == plan.digest
    name = next(iter(plan.sites))
    other = "fp16" if plan.sites[name].format != "fp16" else "bf16"
    assert changed(plan, {name: other}).digest != plan.digest
