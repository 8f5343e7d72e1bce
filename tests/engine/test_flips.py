"""Choices that errors flip, such as those of ReLU's backward pass."""

from collections.abc import Callable
from dataclasses import replace
from math import pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, capture
from precision_compiler.compiler import make_plan
from precision_compiler.flips import NearBoundaries, choice, deciding, flip_variance
from precision_compiler.journal import Journal
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.pipeline import Unit
from precision_compiler.problem import COMPARED, Prices, Problem
from precision_compiler.statistics import Statistics
from precision_compiler.verification import Truth
from tests.helpers import machine
from tests.random_problems import problems

WIDTH, HIDDEN, ROWS = 64, 512, 512
NODE = torch.fx.Graph().placeholder("compared")


class Rectified(nn.Module):
    """Residual layers with an activation between two products."""

    def __init__(self, activation: nn.Module, layers: int = 3) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(self.activation(up(x)))
        return F.mse_loss(x, y)


class Ending(nn.Module):
    """A linear layer, and what is made of its results."""

    def __init__(self, last: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(WIDTH, WIDTH), last

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(self.fc(x), y)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(ROWS, WIDTH, generator=dice) for _ in range(2))
    return x, y


def rectified(activation: nn.Module) -> Captured:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(Rectified(activation), batch(1))


def measured(found: Captured) -> Problem:
    """The problem of a graph without prices, in which every site may have every format."""
    unit = Unit(found.joint.copy(), machine(), Budget.parse(1.0), Journal(), found)
    MeasureSensitivity().run(unit)
    assert unit.statistics is not None
    options = {site.name: ("fp32", "tf32", "bf16", "fp16") for site in unit.joint.sites}
    return Problem(unit.links, options, Prices({}, {}, {}), unit.statistics)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.ReLU6(), nn.Hardtanh(-1.0, 1.0), nn.ELU()]
)
def test_choices_of_an_activation_are_found(activation: nn.Module) -> None:
    found = deciding(rectified(activation).joint.module.graph)
    assert len(found) >= 3
    names = {str(one.target) for ones in found.values() for one in ones}
    assert names <= {f"aten.{word}.Scalar" for word in ("le", "lt", "ge", "gt")}


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Dropout(0.5)])
def test_smooth_activations_and_dropout_choose_nothing(activation: nn.Module) -> None:
    assert not deciding(rectified(activation).joint.module.graph)


def test_masks_and_equal_numbers_are_no_choices() -> None:
    def masked(y: Tensor, keep: Tensor) -> Tensor:
        kept = torch.where(keep > 3, y, 0.0)
        return torch.where(kept == 0, 1.0, kept * 2).amax(-1).sum()

    found = capture(Ending(masked), (batch(1)[0], torch.arange(WIDTH)))
    assert not deciding(found.joint.module.graph)


def test_masks_of_infinities_and_thresholds_of_rows_leave_predictions_finite() -> None:
    def sparse(scores: Tensor, y: Tensor) -> Tensor:
        kept = torch.where(scores > scores.mean(-1, keepdim=True), scores, -torch.inf)
        return F.mse_loss(kept.softmax(-1), y)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = capture(Ending(sparse), batch(1))
    assert deciding(found.joint.module.graph)
    problem = measured(found)
    assert 0.0 < problem.expected_error(problem.uniform("bf16")) < 0.2


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("relative", [0.02, 0.002])
def test_flipped_choices_change_as_much_as_is_predicted(relative: float, one_sided: bool) -> None:
    dice = torch.Generator().manual_seed(4)
    y, first, second, adjoint, noise = (
        torch.randn(1 << 20, generator=dice, dtype=torch.float64) for _ in range(5)
    )
    shown = (y.relu() if one_sided else y).float()
    found = choice([y > 0, first, second], (shown, 0.0))
    assert found is not None
    assert found.size == pytest.approx(1.0, rel=0.01)
    flipped = (y > 0) != (y + relative * noise > 0)
    real = ((first - second) * adjoint * flipped).square().sum()
    predicted = flip_variance(found.density(found.effects(adjoint)), relative**2)
    assert predicted == pytest.approx(float(real), rel=0.1)


def test_numbers_that_are_all_alike_choose_nothing_that_could_flip() -> None:
    zeros = torch.zeros(8)
    assert choice([zeros > 0, zeros, zeros + 1], (zeros, 0.0)) is None


def test_objective_is_the_relative_error_near_the_boundary() -> None:
    """Of 1 in every near number of one tensor, whose root mean square is 4: a sixteenth."""
    y = 4 * torch.randn(1 << 12, generator=torch.Generator().manual_seed(1))
    found = choice([y > 0, y, y], (y, 0.0))
    assert found is not None
    squares = []
    for seed in range(200):
        signs = NearBoundaries([(NODE, found)], lambda: {NODE: 3.0}, seed)
        assert torch.equal(signs[0] != 0, y.abs() < found.size / 2)
        error = torch.randn(len(y), generator=torch.Generator().manual_seed(seed))
        squares.append(float(signs[0] @ error) ** 2)
    assert torch.tensor(squares).mean() == pytest.approx(1 / 16, rel=0.3)
    assert not NearBoundaries([(NODE, found)], dict, 1)[0].any()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.GELU()])
def test_error_of_a_rectified_network_is_predicted(activation: nn.Module) -> None:
    """First-order analysis alone would be many times too low."""
    found = rectified(activation)
    problem, truths = measured(found), [Truth(found.on(batch(seed)), ()) for seed in range(4)]
    for fmt in ("tf32", "bf16", "fp16"):
        sites = problem.links.contractions if fmt == "tf32" else problem.options
        chosen = problem.uniform() | dict.fromkeys(sites, fmt)
        errors = [truth.measure(chosen, 0.0, 0.0).gradient_error for truth in truths]
        real = sum(error**2 for error in errors) ** 0.5 / len(errors) ** 0.5
        assert problem.expected_error(chosen) == pytest.approx(real, rel=0.3)
        if isinstance(activation, nn.GELU):
            assert problem.error(chosen) == problem.expected_error(chosen)
        else:
            assert problem.error(chosen) < real / (1.8 if fmt == "bf16" else 3.0)


def test_hard_choices_of_the_forward_pass_are_predicted_however_the_graph_is_cut() -> None:
    """A jump in the loss itself; the numbers that decide are made next to it, in one chunk."""

    def hard(scores: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.where(scores > 0.3, scores + 1.0, scores), y)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = capture(Ending(hard), batch(1))
    problem, truths = measured(found), [Truth(found.on(batch(seed)), ()) for seed in range(4)]
    chosen = problem.uniform() | dict.fromkeys(problem.links.contractions, "bf16")
    errors = [truth.measure(chosen, 0.0, 0.0).gradient_error for truth in truths]
    real = sum(error**2 for error in errors) ** 0.5 / len(errors) ** 0.5
    assert problem.expected_error(chosen) == pytest.approx(real, rel=0.3)
    assert problem.error(chosen) < real / 2


def with_flips(problem: Problem, density: float) -> Problem:
    statistics: Statistics = replace(
        problem.statistics, flips={"a": density / 4, "b": density * 0.75}
    )
    return replace(problem, statistics=statistics, _cache={})


@given(problems(), st.floats(0.01, 10.0), st.data())
def test_straight_line_is_right_where_it_was_drawn_through(
    problem: Problem, density: float, data: st.DataObject
) -> None:
    posed = with_flips(problem, density)
    chosen = {site: data.draw(st.sampled_from(known)) for site, known in posed.options.items()}
    first_order, compared = posed.error(chosen), posed.error(chosen, COMPARED)
    flips = density * compared / (2 * pi) ** 0.5
    exact = (first_order**2 + flips) ** 0.5
    assert posed.expected_error(chosen) == pytest.approx(exact)
    drawn = replace(posed, slope=posed.flip_slope(chosen), _cache={})
    assert drawn.error(chosen) == pytest.approx(exact)
    assert drawn.expected_error(chosen) == pytest.approx(exact)
    steep = replace(posed, slope=posed.steepest(0.1), _cache={})
    assert steep.expected_error(chosen) == pytest.approx(exact)
    if steep.error(chosen) <= 0.1:
        assert exact <= 0.1 * 1.25**0.5 + 1e-9
    assert replace(problem, slope=problem.steepest(0.1)).slope == 0.0


@pytest.mark.parametrize("budget", ["autocast", 0.02, 0.05])
def test_plan_of_a_rectified_network_holds_its_budget(budget: float | str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Rectified(nn.ReLU())
    fast = machine(fp32=1e9, tf32=2e9, bf16=4e9, e4m3=16e9)
    plan = make_plan(model, batch(1), held_out=batch(2), budget=budget, target=fast)
    assert plan.verification is not None
    assert plan.verification.passed
    assert plan.verification.rounds <= 2
    assert 0.6 * plan.budget.limit < plan.predicted_gradient_error <= 1.01 * plan.budget.limit
    assert 0.75 < plan.verification.measured.ratio < 1.25
