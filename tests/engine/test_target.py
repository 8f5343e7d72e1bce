"""Machines: shipped ones load, mistakes are named, measurements survive on disk."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from precision_compiler import measure
from precision_compiler.compiler import as_target
from precision_compiler.errors import TargetError
from precision_compiler.formats import CHOICES
from precision_compiler.measure import (
    Machine,
    Traffic,
    alternate,
    layout_key,
    measured_machine,
    random_like,
)
from precision_compiler.target import FormatRate, Target
from tests.helpers import machine

TOML = """
name = "small"
description = "a small machine"
device = "cpu"
bandwidth = 1e10
bandwidth_fraction = 0.5
launch_seconds = 1e-6
source = "a test"

[formats.fp32]
peak_flops = 1e11
achieved_fraction = 0.8
source = "a test"

[formats.bf16]
peak_flops = 4e11
achieved_fraction = 0.8
confidence = "weak"
source = "a test"
"""
SHIPPED = [name for name in Target.names() if name != "cpu"]


def loaded(folder: Path, text: str) -> Target:
    path = folder / "small.toml"
    path.write_text(text)
    return Target.load(str(path))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_target_is_plausible(name: str) -> None:
    target = Target.load(name)
    assert target.name == name
    assert target.machine is None
    assert set(target.formats) <= set(CHOICES)
    assert 0 < target.bandwidth_fraction <= 1
    assert not set(target.gemm_formats) & set(CHOICES)
    wide = ("fp32", "tf32", "bf16")
    rates = [target.formats[fmt].flops for fmt in wide if fmt in target.formats]
    assert rates == sorted(rates)
    assert 1e9 < target.memory < 1e12
    assert target.source
    for rate in (*target.formats.values(), *target.gemm_formats.values()):
        assert 0 < rate.achieved_fraction <= 1
        assert rate.source
    assert all(rate.accumulate == "fp32" for rate in target.formats.values())


def test_formats_follow_the_hardware() -> None:
    def has(name: str) -> set[str]:
        target = Target.load(name)
        return {*target.formats, *target.gemm_formats}

    assert "bf16" not in has("v100")
    assert not {"e4m3", "mxfp8", "nvfp4"} & has("a100")
    for name in ("l4", "l40s", "rtx4090", "h100", "h200", "gh200"):
        assert {"e4m3", "e5m2"} <= has(name), name
    for name in ("mi300x", "mi325x"):  # whose 8-bit formats are others, and go by OCP's names too
        assert {"e4m3fnuz", "e5m2fnuz"} <= has(name)
        assert not {"e4m3", "e5m2"} & has(name)
        target = Target.load(name)
        assert target.rate("e4m3") == target.rate("e4m3fnuz")
        assert not {"mxfp8", "nvfp4"} & has(name), name
    for name in ("b200", "gb200", "b300", "gb300"):
        assert {"e4m3", "mxfp8", "mxfp4", "nvfp4"} <= has(name), name
    assert Target.load("h100").formats["e4m3"].layouts == "tn"
    assert Target.load("b300").formats["e4m3"].layouts == "any"
    assert Target.load("b300").rate("nvfp4").layouts == "tn"


def test_names_start_with_this_machine() -> None:
    assert Target.names()[0] == "cpu"
    assert {"a100", "h100", "b200"} <= set(SHIPPED)


def test_file_is_loaded_by_path(tmp_path: Path) -> None:
    target = loaded(tmp_path, TOML)
    assert target.name == "small"
    assert target.formats["bf16"] == FormatRate(4e11, 0.8, "a test", "weak")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("device =", "colour = 3\ndevice =", "colour"),
        ("confidence =", "colour =", r"formats\.bf16\.colour|bf16"),
        ('"cpu"', '"tpu"', "device"),
        ("bandwidth = 1e10", "bandwidth = -1e10", "rates must be positive"),
        ("bandwidth = 1e10", "bandwidth = 0", "rates must be positive"),
        ("bandwidth = 1e10", "bandwidth = nan", "bandwidth|rates must be positive"),
        ("bandwidth = 1e10", 'bandwidth = "fast"', "bandwidth"),
        ("bandwidth = 1e10", "", "bandwidth"),
        ("1e-6", "-1e-6", "rates must be positive"),
        ("peak_flops = 4e11", "peak_flops = -4e11", "rates must be positive"),
        ("[formats.bf16]", "[formats.fp7]", "unknown format 'fp7'"),
        ("[formats.fp32]", "[formats.fp16]", "no rate for fp32"),
        ('"weak"', '"fair"', "confidence"),
        ("name =", "name", "not valid TOML"),
    ],
)
def test_mistake_in_a_file_is_named(before: str, after: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        loaded(tmp_path, TOML.replace(before, after, 1))
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_unknown_target_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"unknown target 'h900': choose auto, cpu, a10, a100"):
        Target.load("h900")
    with pytest.raises(TargetError, match=r"cannot read the target .*absent\.toml: No such file"):
        Target.load(str(tmp_path / "absent.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TargetError, match="is not valid TOML"):
        Target.load(str(tmp_path / "bytes.toml"))


BUILT = """
base = "h100"
name = "mine"
bandwidth = 2.4e12

[formats.e4m3]
achieved_fraction = 0.6
"""


def test_file_builds_on_a_shipped_target(tmp_path: Path) -> None:
    below, target = Target.load("h100"), loaded(tmp_path, BUILT)
    assert target.name == "mine"
    assert target.bandwidth == 2.4e12
    assert target.units == below.units
    assert target.formats["e4m3"] == replace(below.formats["e4m3"], achieved_fraction=0.6)
    assert target.formats["bf16"] == below.formats["bf16"]
    fewer = loaded(tmp_path, 'remove = ["e5m2"]\n' + BUILT)
    assert set(below.formats) - set(fewer.formats) == {"e5m2"}


def test_file_builds_on_a_file(tmp_path: Path) -> None:
    (tmp_path / "below.toml").write_text(BUILT)
    target = loaded(tmp_path, 'base = "below.toml"\nmemory = 1e9\n')
    assert (target.name, target.memory, target.bandwidth) == ("mine", 1e9, 2.4e12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "small.toml"', "key base: it builds on itself"),
        ('base = "h10"', r"key base: unknown target 'h10' \(did you mean 'h100'\?\)"),
        ("base = 3", "key base: give a target's name"),
        ('base = "h100"\nremove = ["e5m"]', r"key remove: no format 'e5m' \(did you mean 'e5m2'"),
        ('base = "h100"\nremove = 3', "key remove: give a list"),
        ('base = "h100"\nbandwith = 1', r"key bandwith: unknown key \(did you mean 'bandwidth'"),
        ('base = "h100"\ndevice = "cudaa"', r"unknown value 'cudaa' \(did you mean 'cuda'"),
        ('base = "h100"\n[formats.bf16]\npeak = 1', r"bf16\.peak: unknown key \(did you mean 'pea"),
        ('base = "h100"\n[quantise.tensor]\namax = 1', r"unknown key \(did you mean 'amax_reads'"),
        (
            'base = "h100"\n[quantise.tensr]\namax_reads = 1\nkernels = 1',
            r"unknown scaling 'tensr' \(did you mean 'tensor'",
        ),
        ('base = "h100"\nunits = 0', "positive"),
        ('base = "h100"\n[formats.e4m3]\nmultiple_k = 0', "positive"),
    ],
)
def test_mistake_in_a_file_on_top_names_key_and_nearest(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        loaded(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_contraction_takes_as_long_as_its_slower_half() -> None:
    target = machine()
    assert target.stream_seconds(1e12) == pytest.approx(1.0)
    assert target.contraction_seconds(1e12, 1, "fp32") == pytest.approx(1.0 + 1e-6)
    assert target.contraction_seconds(1, 2e12, "fp32") == pytest.approx(2.0 + 1e-6)
    assert target.contraction_seconds(4e12, 1, "bf16") == pytest.approx(1.0 + 1e-6)


TRAFFIC = Traffic((1e3, 1e6), (1e-7, 1e-4), (2e-7, 4e-4))


def test_traffic_is_interpolated_between_sizes_and_flat_beyond() -> None:
    assert TRAFFIC.read_seconds(1e3) == pytest.approx(1e-7)
    assert TRAFFIC.read_seconds(2e4) == pytest.approx(2e-6)
    assert TRAFFIC.write_seconds(1e6) == pytest.approx(4e-4)
    assert TRAFFIC.write_seconds(1e9) == pytest.approx(0.4)
    assert TRAFFIC.write_seconds(1e3**1.5) == pytest.approx(1e3**1.5 * 3e-10)  # halfway
    assert TRAFFIC.write_seconds(0) == 0.0
    assert TRAFFIC.bandwidth == pytest.approx(2e6 / 5e-4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measurements that take no time, and a list of what was measured."""
    taken: list[str] = []

    def rates(device: str, side: int) -> dict[str, float]:
        taken.append("rates")
        return {"fp32": 1e11, "bf16": 3e11, "fp16": 1e10}

    def stream(device: str) -> Traffic:
        taken.append("bandwidth")
        return TRAFFIC

    monkeypatch.setattr(measure, "matmul_flops", rates)
    monkeypatch.setattr(measure, "_traffic", stream)
    return taken


def test_machine_is_measured_once_and_read_afterwards(tmp_path: Path, quick: list[str]) -> None:
    first = measured_machine(tmp_path)
    assert quick == ["rates", "bandwidth"]
    assert first.path.parent == tmp_path
    assert measured_machine(tmp_path) == first
    assert quick == ["rates", "bandwidth"]
    assert first.threads == torch.get_num_threads()
    assert first.matmul_flops["bf16"] == 3e11


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"identity": {}}', '{"identity": 3, "cases": []}', "\x00"]
)
def test_damaged_measurements_are_taken_anew(damage: str, tmp_path: Path, quick: list[str]) -> None:
    first = measured_machine(tmp_path)
    first.path.write_text(damage)
    assert measured_machine(tmp_path).matmul_flops == first.matmul_flops
    assert len(quick) == 4
    assert json.loads(first.path.read_text())["identity"]


@pytest.mark.parametrize("key", ["identity", "matmul_flops", "traffic", "launch_seconds", "cases"])
@pytest.mark.parametrize("value", [None, [], "text", {"sizes": [], "read": [], "write": []}])
def test_damaged_key_is_measured_anew(
    key: str, value: object, tmp_path: Path, quick: list[str]
) -> None:
    path = measured_machine(tmp_path).path
    record = json.loads(path.read_text())
    record[key] = value
    path.write_text(json.dumps(record))
    assert measured_machine(tmp_path).matmul_flops["fp32"] == 1e11
    assert len(quick) == 4


def test_times_of_a_busy_machine_are_measured_anew(tmp_path: Path, quick: list[str]) -> None:
    """Threads that wait for a core at every barrier: a thousand times slower than now."""
    found = measured_machine(tmp_path)
    found.keep({"case": 0.004})
    record = json.loads(found.path.read_text())
    record["traffic"]["read"] = [1.0 for _ in TRAFFIC.sizes]
    found.path.write_text(json.dumps(record))
    again = measured_machine(tmp_path)
    assert len(quick) == 4
    assert again.traffic == TRAFFIC
    assert again.cases == {}
    assert measured_machine(tmp_path) == again
    assert len(quick) == 4


def test_another_thread_count_is_another_machine(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured_machine(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    second = measured_machine(tmp_path)
    assert second.threads == 99
    assert second.path != first.path
    assert len(quick) == 4


def test_cases_are_timed_once_and_kept(tmp_path: Path, quick: list[str]) -> None:
    calls: list[str] = []
    found = measured_machine(tmp_path)
    times = found.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert set(times) == {"a", "b"}
    assert all(0 <= value < 1 for value in times.values())
    count = len(calls)
    assert found.seconds({"a": lambda: calls.append("a")}) == {"a": times["a"]}
    again = measured_machine(tmp_path)
    assert again.seconds({"b": lambda: calls.append("b")}) == {"b": times["b"]}
    assert len(calls) == count
    assert quick == ["rates", "bandwidth"]


@pytest.mark.usefixtures("quick")
def test_folder_that_cannot_be_written_only_costs_the_next_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = measured_machine(tmp_path / "file" / "folder")
    assert found.traffic == TRAFFIC
    assert found.seconds({"a": lambda: None})["a"] >= 0


def test_cases_alternate() -> None:
    order: list[str] = []
    alternate({name: lambda name=name: order.append(name) for name in "ab"})  # type: ignore[misc]
    assert order == ["a", "b"] * (len(order) // 2)


def test_this_machine_is_a_target(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured_machine(tmp_path)
    monkeypatch.setattr("precision_compiler.target.measured_machine", lambda device: found)
    for name in ("auto", "cpu"):
        target = Target.load(name)
        assert target.name == "cpu"
        assert target.machine is found
        assert target.formats["bf16"].flops == 3e11
    assert quick


def test_the_gpu_at_hand_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(TargetError, match="torch finds none: name a shipped target"):
        Target.load("cuda")


def test_a_gpu_at_hand_is_a_target_of_its_architecture(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = replace(measured_machine(tmp_path), device="cuda")
    monkeypatch.setattr("precision_compiler.target.measured_machine", lambda device: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("auto", "cuda"):
        target = Target.load(name)
        assert (target.name, target.device, target.architecture) == ("cuda", "cuda", "sm_90")
        assert target.machine is found
    assert as_target("auto", [torch.ones(1)]).name == "cpu"  # where the model is
    assert quick


def test_random_tensor_has_sizes_strides_and_dtype() -> None:
    like = torch.empty(4, 6, device="meta").t()
    made = random_like(like, torch.bfloat16)
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), torch.bfloat16)
    assert made.isfinite().all()
    assert not random_like(torch.empty(3, device="meta"), torch.int64).any()


def test_layouts_that_may_differ_in_time_have_different_keys() -> None:
    x = torch.empty(4, 6)
    values = [x, x.t(), x.bfloat16(), x[:3], 3, 4, None, True]
    assert len({layout_key([value]) for value in values}) == len(values)
    assert layout_key([x]) == layout_key([torch.ones(4, 6)])


def test_machines_differ_by_what_they_hold(tmp_path: Path) -> None:
    one = Machine("a", 1, {}, TRAFFIC, 1.0, tmp_path)
    assert replace(one, threads=2) != one
