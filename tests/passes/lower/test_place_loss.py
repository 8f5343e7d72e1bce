"""One kernel for the last product and its cross entropy, where the target gains by it."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, capture
from precision_compiler.journal import Journal
from precision_compiler.links import find_links
from precision_compiler.lowering.cross_entropy import cross_entropies
from precision_compiler.lowering.relocate import on_gpu
from precision_compiler.passes import EMULATE, REWRITE
from precision_compiler.passes.lower.place_loss import BACKWARD, LOSS
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.replay import gradients_of, relative_error
from precision_compiler.target import Target
from tests import lowered_run

TOKENS, WORDS, DEPTH = 1024, 16384, 32
SHAPE = (8, TOKENS // 8)


class Model(nn.Module):
    """A linear layer, another to the words, and the loss in one of several spellings."""

    def __init__(self, spelling: str, depth: int = DEPTH, words: int = WORDS) -> None:
        super().__init__()
        self.spelling, self.words = spelling, words
        self.fc = nn.Linear(depth, depth)
        self.head = nn.Linear(depth, words, bias=spelling == "bias")
        self.head.weight.requires_grad_(spelling != "frozen")

    def forward(self, x: Tensor, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.head(self.fc(x))
        if self.spelling == "shifted":
            logits, y = logits[:, :-1].contiguous(), y[:, 1:].contiguous()
        rows, y = logits.view(-1, self.words), y.view(-1)
        if self.spelling == "first rows":
            rows, y = rows[: TOKENS // 2], y[: TOKENS // 2]
        if self.spelling == "log softmax":
            return F.nll_loss(F.log_softmax(rows, dim=-1), y)
        if self.spelling == "ignored":
            return 3 * F.cross_entropy(rows.float(), y, ignore_index=7)
        if self.spelling == "smooth":
            return F.cross_entropy(rows, y, label_smoothing=0.1)
        loss = F.cross_entropy(rows, y)
        return loss + 1e-4 * rows.logsumexp(-1).square().mean() if self.spelling == "z" else loss


@cache
def found(spelling: str, depth: int = DEPTH, words: int = WORDS) -> Captured:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Model(spelling, depth, words)
        y = torch.randint(words, SHAPE)
        y[0, :50] = 7
        return capture(model, (torch.randn(*SHAPE, depth), y))


def assignment(captured: Captured, fmt: str) -> dict[str, str]:
    links = find_links(captured.joint)
    chosen = dict.fromkeys(links.contractions, fmt)
    return chosen | {name: fmt if name in links.writer else "fp32" for name in links.stores}


def lowered(captured: Captured, target: str | None = "h100", fmt: str = "bf16") -> Unit:
    machine = Target.load(target) if target else None
    architecture = machine.architecture if machine else "sm_90"
    unit = Unit(
        on_gpu(captured.joint), machine, Budget.parse(1.0), Journal(),
        assignment=assignment(captured, fmt), architecture=architecture,
    )  # fmt: skip
    Pipeline(REWRITE, given=frozenset({"assignment"})).run(unit)
    return unit


def calls(unit: Unit) -> list[object]:
    return [n.target for n in unit.joint.module.graph.nodes if n.target in (LOSS, BACKWARD)]


def notes(unit: Unit) -> list[str]:
    found = [e.message for e in unit.journal.entries if e.step == "place-loss"]
    return [message for message in found if message.startswith("the loss of")]


@pytest.mark.parametrize("spelling", ["plain", "log softmax", "ignored"])
def test_it_takes_the_place_of_three_products_and_gives_the_planned_numbers(spelling: str) -> None:
    captured = found(spelling)
    unit = lowered(captured)
    assert calls(unit) == [LOSS, BACKWARD]
    (note,) = notes(unit)
    assert f"{2.0 * TOKENS * WORDS:.3g} bytes of logits are never stored" in note
    shapes = [n.meta["val"].shape for n in unit.joint.module.graph.nodes if is_tensor(n)]
    assert not [shape for shape in shapes if shape.numel() == TOKENS * WORDS]
    twin = Unit(
        captured.joint.copy(), None, Budget.parse(1.0), Journal(), assignment=unit.assignment
    )
    Pipeline(EMULATE, given=frozenset({"assignment"})).run(twin)
    _, exact = gradients_of(captured)
    planned_loss, wanted = gradients_of(captured, twin.joint.module)
    loss, actual = gradients_of(captured, unit.joint.module, run=lowered_run.run)
    rounding = relative_error(wanted, exact)
    assert rounding > 1e-3
    assert relative_error(actual, exact) < 1.1 * rounding  # logits are rounded once less
    assert abs(float(loss) - float(planned_loss)) < 1e-3 * float(planned_loss)


def is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ("bias", "no plain product"),
        ("z", "something else reads its logits"),
        ("frozen", "is not read by two plain products"),
        ("shifted", "no plain product"),
        ("first rows", "no plain product"),
    ],
)
def test_it_stays_away_where_it_would_compute_something_else(spelling: str, reason: str) -> None:
    unit = lowered(found(spelling))
    assert calls(unit) == []
    (note,) = notes(unit)
    assert reason in note


def test_another_loss_is_not_taken_for_it() -> None:
    unit = lowered(found("smooth"))
    assert calls(unit) == []
    assert notes(unit) == []


def test_products_in_8_bits_keep_their_format() -> None:
    unit = lowered(found("plain"), fmt="e4m3")
    assert calls(unit) == []
    assert "no plain product of two 16-bit matrices" in notes(unit)[0]


def test_a_deep_product_is_not_computed_twice() -> None:
    unit = lowered(found("plain", depth=1024))
    assert calls(unit) == []
    assert "computing logits again takes" in notes(unit)[0]


def test_it_is_found_where_gradients_are_off() -> None:
    """A backend is called in whatever mode the model first runs."""
    with torch.no_grad():
        unit = lowered(found("plain", words=WORDS + 1))
    assert calls(unit) == [LOSS, BACKWARD]


def test_an_open_size_is_another_loss() -> None:
    graph = found("plain").joint.copy().module.graph
    assert len(list(cross_entropies(graph))) == 1
    (zeros,) = (
        node
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
        if node.args[0] == [TOKENS, WORDS]
    )
    holder = graph.find_nodes(op="placeholder")[0]
    with graph.inserting_before(zeros):
        size = graph.call_function(torch.ops.aten.sym_size.int, (holder, 0))
    zeros.args = ([size, WORDS], *zeros.args[1:])
    assert list(cross_entropies(graph)) == []


def test_an_unknown_machine_is_left_alone() -> None:
    unit = lowered(found("plain"), target=None)
    assert calls(unit) == []
    assert "speed is not known" in notes(unit)[0]
