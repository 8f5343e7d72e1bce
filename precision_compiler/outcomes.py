"""What a plan promises, what was measured of it, and how long its steps took."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from precision_compiler.calibrated import Calibrated
from precision_compiler.journal import STRICT

Label = Literal["plan", "fp32", "autocast"]
"""Ways to run a model that are compared: the solver's formats, float32, autocast's formats."""


@dataclass(frozen=True)
class Totals:
    """Sums over the plan.

    Attributes:
        predicted_seconds: time of one forward and backward pass, as far as formats decide it.
        predicted_gradient_error: relative gradient error.
        bound_seconds: no assignment within the budget is faster than this (proven).
        gap: (predicted - bound) / predicted.
        fp32_seconds: predicted time of everything in float32.
        autocast_seconds: predicted time of torch.autocast's bf16 policy over the same sites.
        autocast_gradient_error: predicted error of that policy.
        casts: copies of tensors in a format that they are not stored in, or results that are
            stored in another format than they come in; each is priced once, however many read it.
            What fused kernels do in their registers is none.
        predicted_loss_sigma: predicted standard deviation of the loss value, in its own unit.
        predicted_tensor_error: predicted root mean square, over parameter tensors, of the relative
            error of each one's gradient; None where it was not asked for.
        gradient_norm: norm of the gradient on the calibration batches.
        loss: loss on the calibration batches.
        batches: calibration batches.
        activation_bytes, fp32_activation_bytes, autocast_activation_bytes: predicted bytes kept
            from the forward to the backward pass, where activation memory peaks.
        calibrated: what corrects predicted times by the measured steps of a trial; None if there
            was none.
    """

    __pydantic_config__ = STRICT

    predicted_seconds: float
    predicted_gradient_error: float
    bound_seconds: float
    gap: float
    fp32_seconds: float
    autocast_seconds: float
    autocast_gradient_error: float
    casts: int
    predicted_loss_sigma: float
    predicted_tensor_error: float | None
    gradient_norm: float
    loss: float
    batches: int
    activation_bytes: float = 0.0
    fp32_activation_bytes: float = 0.0
    autocast_activation_bytes: float = 0.0
    calibrated: Calibrated | None = None

    @property
    def calibrated_seconds(self) -> float | None:
        """Predicted time of one pass, corrected by measured steps; None if there are none."""
        rule = self.calibrated
        return None if rule is None else rule.seconds(self.predicted_seconds)


@dataclass(frozen=True)
class MeasuredError:
    """What a plan's exact numerics did to one batch, beside what was predicted.

    Attributes:
        gradient_error: ``||dG|| / ||G||`` over all parameters.
        predicted_gradient_error: the plan's prediction of it.
        tensor_error: root mean square, over parameter tensors, of the relative error of each
            one's gradient; structurally zero gradients are left out.
        tensors: that error by parameter.
        zero_gradients: parameters left out, their gradient being zero by the model's structure.
        loss: loss in float32.
        loss_error: its change.
        predicted_loss_sigma: the plan's prediction of the size of that change.
    """

    __pydantic_config__ = STRICT

    gradient_error: float
    predicted_gradient_error: float
    tensor_error: float
    tensors: Mapping[str, float]
    zero_gradients: tuple[str, ...]
    loss: float
    loss_error: float
    predicted_loss_sigma: float

    @property
    def ratio(self) -> float:
        """Measured over predicted gradient error; 1 where nothing is rounded."""
        if self.predicted_gradient_error == 0.0:
            return 1.0
        return self.gradient_error / self.predicted_gradient_error


@dataclass(frozen=True)
class Verification:
    """How a plan's prediction was checked, and what came of it.

    Attributes:
        measured: the errors of the plan as it is.
        held_out: whether the batch had no part in the calibration.
        rounds: times the plan was measured.
        raised: by site and format, factors by which predicted variances were multiplied in between.
        passed: whether the measured error is within the budget and 1.5 times the prediction.
    """

    __pydantic_config__ = STRICT

    measured: MeasuredError
    held_out: bool
    rounds: int
    raised: Mapping[str, Mapping[str, float]]
    passed: bool


@dataclass(frozen=True)
class Trial:
    """Steps that were compiled and timed on this machine, alternately.

    Attributes:
        seconds: median of a forward and backward pass, by candidate: "plan", "fp32", "autocast".
        winner: whose formats the plan has.
        sentence: which was kept, and why; and how well its time was predicted.
        prices: predicted seconds by candidate, before any correction.
        anchors: candidates whose step corrects the predictions, those with the same formats
            included: what is said of their time is measured and no prediction.
    """

    __pydantic_config__ = STRICT

    seconds: Mapping[str, float]
    winner: Label
    sentence: str
    prices: Mapping[str, float] = field(default_factory=dict)
    anchors: tuple[Label, ...] = ()

    @property
    def calibrated(self) -> Calibrated | None:
        """What makes the prices of float32 and autocast come out as measured."""
        return Calibrated.by_anchors(self.prices, self.seconds) if self.prices else None
