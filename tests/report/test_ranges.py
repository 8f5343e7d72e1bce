"""How large a site's tensors are, as plans have it."""

import json
from math import frexp, isclose

import torch

from precision_compiler.plan import Plan
from precision_compiler.replay import Replay, execute
from tests.models import captured, planned


def test_every_measured_site_has_the_ranges_of_its_tensors() -> None:
    plan = planned("gpt")
    for site in plan.sites.values():
        names = [found.tensor for found in site.ranges]
        if site.kind == "storage":
            assert names in (["stored"], [])
        else:
            assert names == sorted(names)
            assert all(name.startswith("operand ") for name in names)
        for found in site.ranges:
            assert isclose(sum(found.shares), 1.0, abs_tol=1e-3)
            top = found.lowest + len(found.shares) - 1
            assert found.shares[0] > 0 or len(found.shares) == 1
            assert top <= frexp(found.amax)[1] - 1


def test_shares_are_those_of_the_tensor() -> None:
    found, plan = captured("mlp"), planned("mlp")
    values: dict[str, torch.Tensor] = {}

    def run(node: torch.fx.Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        made_value = execute(node, args, kwargs)
        if isinstance(made_value, torch.Tensor):
            values[node.name] = made_value.detach()
        return made_value

    joint = found.joint
    Replay(joint.module, joint.inputs, joint.outputs, run).forward()
    checked = 0
    for site in joint.sites:
        ranges = plan.sites[site.name].ranges
        if site.kind != "storage" or site.node not in values or not ranges:
            continue
        tensor = values[site.node]
        known = tensor[tensor != 0].abs().double()
        exponents = torch.frexp(known)[1] - 1
        share = float((exponents == ranges[0].lowest + len(ranges[0].shares) - 1).double().mean())
        assert isclose(ranges[0].shares[-1], share, abs_tol=0.02)
        assert isclose(ranges[0].amax, float(known.max()), rel_tol=1e-6)
        checked += 1
    assert checked > 1


def test_a_plan_without_them_is_read() -> None:
    """Files from before plans had them, and plans of models without weights, have none."""
    record = json.loads(planned("mlp").to_json())
    for site in record["sites"].values():
        del site["ranges"]
    plan = Plan.from_json(json.dumps(record))
    assert all(site.ranges == () for site in plan.sites.values())
