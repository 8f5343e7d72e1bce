"""Measuring a plan's error on any batch, training with its exact numerics, planning on several."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import precision_compiler
from precision_compiler.capture import capture
from precision_compiler.flags import Flag
from precision_compiler.plan import Plan
from precision_compiler.replay import gradients_of, relative_error
from precision_compiler.verification import emulated
from tests.helpers import machine
from tests.models import Attention, Gpt, Mlp, made

BF16 = machine(fp32=1e9, bf16=4e9)
FP8 = machine(fp32=1e9, bf16=4e9, e4m3=16e9)
"""Targets where arithmetic takes so long that nothing else counts."""


class Stateful(nn.Module):
    """Buffers that training changes, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(16, 64), nn.BatchNorm1d(64)
        self.dropout, self.down = nn.Dropout(0.3), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.down(self.dropout(F.relu(self.norm(self.up(x))))), x.roll(1, 0))


class Attentive(nn.Module):
    """One attention layer, an activation and a sum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attention = Attention(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(x + F.relu(self.attention(x)), x.roll(1, 1))


def sequences(seed: int, rows: int = 4, width: int = 32) -> tuple[Tensor]:
    return (torch.randn(rows, 16, width, generator=torch.Generator().manual_seed(seed)),)


def drawn(seed: int, rows: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 16, generator=generator) for _ in range(2))  # type: ignore[return-value]


def tokens(seed: int, rows: int = 4, length: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(40, (rows, length), generator=generator) for _ in range(2))  # type: ignore[return-value]


def fresh(kind: type[nn.Module], **sizes: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**sizes)


@pytest.fixture(scope="module")
def stateful_plan() -> Plan:
    return precision_compiler.make_plan(fresh(Stateful), drawn(0)[0], target=FP8, budget=0.1)


def test_measuring_leaves_model_buffers_and_random_numbers_untouched(stateful_plan: Plan) -> None:
    model = fresh(Stateful)
    before, attributes = deepcopy(model.state_dict()), dict(model.__dict__)
    random = torch.get_rng_state()
    for other in (drawn(0)[0], drawn(1)[0], drawn(2, rows=8)[0]):
        found = precision_compiler.measure_error(model, other, stateful_plan)
        assert 0 < found.gradient_error < 0.5
    assert torch.equal(torch.get_rng_state(), random)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.__dict__ == attributes
    assert model.training
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("name", ["explicit", "dropout"])
def test_numbers_are_those_of_the_plans_own_verification_on_the_same_batch(name: str) -> None:
    case = made(name)
    plan = precision_compiler.make_plan(case.model, case.batch, loss=case.loss, target=FP8)
    found = precision_compiler.measure_error(case.model, case.batch, plan, loss=case.loss)
    assert plan.verification is not None
    assert found == plan.verification.measured
    assert found.gradient_error > 0
    assert found.predicted_gradient_error == plan.predicted_gradient_error
    assert bool(found.zero_gradients) == (name == "explicit")


def test_held_out_batch_verifies_the_plan() -> None:
    model, held_out = fresh(Gpt, blocks=1), tokens(1, rows=2, length=12)
    plan = precision_compiler.make_plan(
        model, tokens(0), target=BF16, budget=0.01, held_out=held_out
    )
    assert plan.verification is not None
    assert plan.verification.held_out
    assert plan.verification.measured.loss == pytest.approx(model(*held_out).item(), rel=1e-5)
    assert plan.verification.measured == precision_compiler.measure_error(model, held_out, plan)


def test_plan_of_another_model_is_refused(stateful_plan: Plan) -> None:
    model = fresh(Mlp, hidden=48)
    before = dict(model.__dict__)
    with pytest.raises(precision_compiler.PlanMismatch, match=r"up\.fprop"):
        precision_compiler.measure_error(model, drawn(0), stateful_plan)
    assert model.__dict__ == before


@pytest.fixture(scope="module")
def bf16_plan() -> Plan:
    return precision_compiler.make_plan(fresh(Attentive), sequences(0), target=BF16, budget=0.01)


@pytest.fixture(scope="module")
def fp8_plan() -> Plan:
    return precision_compiler.make_plan(fresh(Attentive), sequences(0), target=FP8, budget=0.3)


@pytest.fixture(params=["bf16", "e4m3"])
def plan(request: pytest.FixtureRequest, bf16_plan: Plan, fp8_plan: Plan) -> Plan:
    found = bf16_plan if request.param == "bf16" else fp8_plan
    contractions = [c.format for c in found.sites.values() if c.kind == "contraction"]
    assert contractions.count(request.param) > 3
    return found


def test_emulated_model_trains_with_the_gradients_of_the_emulated_graph(plan: Plan) -> None:
    """In lockstep with a plain model that is given the emulated graph's gradients."""
    model, twin, batch = fresh(Attentive), fresh(Attentive), sequences(0)
    assert precision_compiler.emulate(model, plan) is model
    assert precision_compiler.plan_of(model) is plan
    losses = []
    for step in range(3):
        found = capture(twin, batch)
        module = emulated(found, plan.assignment)
        loss, expected = gradients_of(found, module)
        model.zero_grad()
        losses.append(model(*batch))
        losses[-1].backward()
        gradients = dict(model.named_parameters())
        ours = [gradients[name].grad for name in found.joint.goal_names]
        assert relative_error([g for g in ours if g is not None], expected) < 1e-5
        assert losses[-1].item() == pytest.approx(loss.item(), rel=1e-5)
        if step == 0:
            error = relative_error(expected, gradients_of(found)[1])
            assert error == pytest.approx(plan.predicted_gradient_error, rel=0.3)
        _descend(model, 0.01)
        twin.load_state_dict(model.state_dict())
    assert losses[-1] < losses[0]


def _descend(model: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for value in model.parameters():
            assert value.grad is not None
            value.sub_(rate * value.grad)


def test_trained_and_compiled_model_can_be_measured_and_planned_anew(bf16_plan: Plan) -> None:
    model = precision_compiler.compile(fresh(Attentive), sequences(0), plan=bf16_plan)
    for rows in (4, 3):  # sizes become symbolic
        model(*sequences(0, rows)).backward()
    one, other = (
        precision_compiler.measure_error(which, sequences(1), bf16_plan)
        for which in (model, fresh(Attentive))
    )
    assert one.gradient_error == pytest.approx(other.gradient_error, rel=1e-3)
    again = precision_compiler.make_plan(model, sequences(0), target=BF16, budget=0.01)
    assert again.totals.gradient_norm == pytest.approx(bf16_plan.totals.gradient_norm, rel=1e-4)


def test_emulating_another_models_plan_fails_at_the_first_call(bf16_plan: Plan) -> None:
    model = precision_compiler.emulate(fresh(Attentive, width=48), bf16_plan)
    with pytest.raises(precision_compiler.PlanMismatch, match=r"attention\.qkv\.fprop"):
        model(*sequences(0, width=48))


@pytest.mark.parametrize("wrong", ["plan.json", None, {}])
def test_what_is_no_plan_is_refused(wrong: Any) -> None:
    model = fresh(Mlp)
    before = dict(model.__dict__)
    with pytest.raises(precision_compiler.PlanError, match=r"Plan\.load"):
        precision_compiler.emulate(model, wrong)
    assert model.__dict__ == before


def test_calibration_batches_are_averaged_over_and_tell_the_noise() -> None:
    model = fresh(Mlp)
    alone = precision_compiler.make_plan(model, drawn(0), target=FP8)

    def more() -> Iterator[tuple[Tensor, Tensor]]:
        yield from (drawn(1), drawn(2))

    plan = precision_compiler.make_plan(model, drawn(0), target=FP8, calibration=more())
    assert (alone.totals.batches, plan.totals.batches) == (1, 3)
    losses = [model(*drawn(seed)).item() for seed in range(3)]
    assert alone.totals.loss == pytest.approx(losses[0], rel=1e-5)
    assert plan.totals.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert plan.budget.asked == "auto"
    assert plan.budget.noise_origin == "3 calibration batches"
    assert alone.budget.noise_origin == "2 parts of the batch, 16 each"


@pytest.mark.parametrize("rows", [8, 64])
def test_calibration_batches_may_have_another_shape(rows: int) -> None:
    other = [drawn(1, rows), drawn(2, 1)]
    plan = precision_compiler.make_plan(fresh(Mlp), drawn(0), target=FP8, calibration=other)
    assert plan.totals.batches == 3
    assert plan.verification is not None
    assert plan.verification.passed
    assert plan.sites["up.fprop"].shape == (32, 64)


def swamped(plan: Plan) -> list[Flag]:
    return [flag for flag in plan.flags if flag.name == "update-swamping"]


def test_learning_rate_tells_what_narrow_weights_would_lose() -> None:
    model = fresh(Mlp)
    shares = []
    for rate in (None, 1e-1, 1e-4):
        plan = precision_compiler.make_plan(
            model, drawn(0), target=FP8, budget=0.1, learning_rate=rate
        )
        shares.append([flag.numbers["share"] for flag in swamped(plan)])
    assert shares[:2] == [[], []]
    weights = torch.cat([value.detach().flatten() for value in model.parameters()])
    half_a_step = torch.exp2(torch.frexp(weights)[1] - 1.0 - 8.0)  # of bf16, 8 significant bits
    assert shares[2] == [pytest.approx((half_a_step > 1e-4).double().mean().item())]
    assert 0.1 < shares[2][0] < 0.9


@pytest.mark.parametrize("memory", [0.0, 1e4, float("inf")])
def test_memory_changes_nothing_but_the_time(memory: float) -> None:
    usual, limited = (
        precision_compiler.make_plan(fresh(Mlp), drawn(0), target=FP8, budget=0.02, memory=bytes_)
        for bytes_ in (None, memory)
    )
    assert limited.assignment == usual.assignment
    assert limited.predicted_gradient_error == pytest.approx(
        usual.predicted_gradient_error, rel=1e-4
    )
