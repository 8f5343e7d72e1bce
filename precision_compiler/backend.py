"""The torch.compile backend "precision", and compiling a module in place."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from precision_compiler.budget import Budget
from precision_compiler.calling import Loss, apart, unbroken_by_logging
from precision_compiler.capture import capture, captured_alone
from precision_compiler.compiler import Decision, as_target, decide, plan_for, rewrite
from precision_compiler.errors import PlanError, PrecisionError
from precision_compiler.fitting import check_plan
from precision_compiler.joint import JointGraph, after_own_passes, input_names, trace_joint
from precision_compiler.outcomes import Trial
from precision_compiler.passes import EMULATE, REWRITE
from precision_compiler.pipeline import Pass
from precision_compiler.plan import Plan, digest_of
from precision_compiler.target import Target
from precision_compiler.toolchain import require_toolchain
from precision_compiler.trial import run_trial
from precision_compiler.wide_casts import SplitCasts

_ATTRIBUTE = "_precision_backend"  # where a module compiled in place keeps its backend
_OPTIONS = ("target", "budget", "plan")


class _Rewrite(CustomGraphPass):
    """Carries a plan out on the joint graph that Inductor is about to compile."""

    def __init__(
        self,
        plan: Plan,
        names: list[str],
        parameters: list[bool],
        strict: bool,
        passes: Sequence[Pass],
    ) -> None:
        self.plan, self.names, self.parameters = plan, names, parameters
        self.strict, self.passes = strict, passes

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None
        joint = JointGraph.of(module, self.names, self.parameters)
        strict = self.strict and not joint.inference
        rewrite(joint, self.plan, strict=strict, passes=self.passes)

    def uuid(self) -> str:
        """The plan's decisions and our own source: Inductor's caches stay valid."""
        names = [step.name for step in self.passes]
        return f"{self.plan.digest}-{_source_hash()}-{self.parameters}-{self.strict}-{names}"


@cache
def _source_hash() -> str:
    here = Path(__file__).parent
    passes = (here / "passes").resolve()  # a link in a checkout, which rglob does not follow
    files = sorted({*here.rglob("*.py"), *passes.rglob("*.py")})
    return hashlib.sha256(get_hash_for_files(tuple(map(str, files)))).hexdigest()


class PrecisionBackend:
    """Compiles Dynamo's graphs through Inductor with the formats of a plan.

    The first training graph decides the plan where none is given; later graphs of the same model
    (evaluation mode, other batch shapes) follow it by site name.
    """

    def __init__(
        self,
        target: str | Target,
        budget: float | str,
        plan: Plan | None,
        passes: Sequence[Pass] = REWRITE,
    ) -> None:
        """Take the options of ``compile``.

        Args:
            target: machine to plan for.
            budget: largest relative gradient error.
            plan: a plan made before.
            passes: REWRITE, or EMULATE for the plan's exact numerics on any machine.
        """
        self.target, self.budget, self.plan = target, Budget.parse(budget), plan
        self.passes, self._compiled = passes, False

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs."""
        if self.plan is None:
            joint = trace_joint(module, inputs)
            if joint.inference:
                return _compile(module, inputs, {})
            self.plan = plan_for(captured_alone(joint), as_target(self.target, inputs), self.budget)
        parameters = [isinstance(value, nn.Parameter) for value in inputs]
        names = input_names(module)
        hook = _Rewrite(self.plan, names, parameters, not self._compiled, self.passes)
        patches = after_own_passes("joint_custom_pre_pass", hook)
        if any(fmt != "fp32" for fmt in self.plan.assignment.values()):
            # Without it, kernels pass values on unrounded where plan and prediction have them
            # rounded: the error then is not the one that was predicted, and varies with fusion.
            patches["emulate_precision_casts"] = True
            patches |= after_own_passes("joint_custom_post_pass", SplitCasts())
        compiled = _compile(module, inputs, patches)
        self._compiled = self._compiled or torch.is_grad_enabled()
        return compiled


def _compile(
    module: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    with without_remarks():
        return compile_fx(module, list(inputs), config_patches=patches)  # type: ignore[return-value]


@contextmanager
def without_remarks() -> Iterator[None]:
    """Leave out Inductor's remark on fused kernels with one tensor in bf16 and another in fp16.

    Backward graphs are compiled when they first run: a program that wants quiet wraps that too.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed in the scheduler node")
        yield


def precision(
    module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend of ``torch.compile(model, backend="precision", options={...})``.

    Args:
        module: Dynamo's graph.
        inputs: its inputs.
        options: "target", "budget" and "plan", as in ``precision_compiler.compile``.

    Raises:
        PrecisionError: an option is unknown, or the plan cannot be made or does not match.
    """
    given = dict(options or {})
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        raise PrecisionError(f"unknown option {unknown[0]!r}: choose from {', '.join(_OPTIONS)}")
    backend = PrecisionBackend(
        given.get("target", "auto"), given.get("budget", "auto"), given.get("plan")
    )
    return backend(module, inputs)


def compile(
    model: nn.Module,
    batch: Any = None,
    *,
    loss: Loss | None = None,
    target: str | Target = "auto",
    budget: float | str = "auto",
    plan: Plan | None = None,
    trial: bool = True,
) -> nn.Module:
    """Compile a module in place with the formats of a plan, and return it.

    The object, its ``state_dict`` keys and its parameters' dtypes stay what they are. Where this
    machine is the target and a batch is given, the step is compiled with float32 and with
    autocast's formats as well, timed once, and the fastest is kept.

    Args:
        model: the module.
        batch: a training batch to plan on now: a tensor, a tuple of arguments or a dict of
            keywords. Without it the first training call decides, on its own batch.
        loss: ``loss(output, batch)`` where the model does not return its loss.
        target: machine to plan for, "auto" for this one.
        budget: largest relative gradient error, "autocast", "noise:x" or "auto", as in
            ``make_plan``.
        plan: a plan made earlier, on this or another machine; nothing is analysed then.
        trial: whether to time it against float32 and autocast, which compiles copies of the
            module; times are kept on disk.

    Raises:
        CaptureError, BudgetError, TargetError, PlanMismatch, ToolchainError: each says what to
            do; the model is left as it was.
    """
    require_toolchain()
    if plan is not None:
        _require_plan(plan)
    Budget.parse(budget)
    if plan is not None and batch is not None:
        check_plan(plan, capture(model, batch, loss).joint.sites)
    elif plan is None and batch is not None:
        captured = capture(model, batch, loss)
        machine = as_target(target, model.parameters())
        decision = decide(captured, machine, Budget.parse(budget))
        plan = decision.plan(_trial(model, batch, loss, decision) if trial else None)
    elif plan is None:
        as_target(target)
    return _installed(model, PrecisionBackend(target, budget, plan))


def _trial(model: nn.Module, batch: Any, loss: Loss | None, decision: Decision) -> Trial | None:
    """Steps of the decision's candidates, timed if this machine is the target."""
    machine = decision.unit.target.machine
    if machine is None or not decision.captured.joint.has_values:
        return None
    base, candidates = decision.plan(), decision.candidates

    def compiled(twin: nn.Module, label: str) -> nn.Module:
        plan = base.with_formats(candidates[label])
        return _installed(twin, PrecisionBackend(decision.unit.target, 0.0, plan))

    digests = {label: digest_of(base.fingerprint, found) for label, found in candidates.items()}
    problem = decision.unit.problem
    prices = {label: problem.seconds(found) for label, found in candidates.items()}
    return run_trial(model, batch, loss, digests, prices, compiled, machine)


def emulate(model: nn.Module, plan: Plan) -> nn.Module:
    """Compile a module in place with the exact numerics of a plan, on any machine; return it.

    Operands and results are rounded as the plan's formats have it, products accumulate in
    float32: a plan for a GPU can be tried for its loss curve on a laptop, at float32 speed.

    Raises:
        PlanError: ``plan`` is not a plan.
        ToolchainError: there is no C++ compiler.
        PlanMismatch: (at the first call) the plan belongs to another model.
    """
    require_toolchain()
    _require_plan(plan)
    return _installed(model, PrecisionBackend("auto", 0.0, plan, EMULATE))


def _installed(model: nn.Module, backend: PrecisionBackend) -> nn.Module:
    def call(*args: Any, **kwargs: Any) -> Any:  # what model.compile compiles
        return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    compiled = torch.compile(apart(call), backend=backend)
    model._compiled_call_impl = _with_our_errors(unbroken_by_logging(compiled))
    model.__dict__[_ATTRIBUTE] = backend
    return model


def _with_our_errors(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Call a compiled function; a mistake we report is raised as such, not as Dynamo's failure."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, PrecisionError):
                raise error.inner_exception from None
            raise

    return call


def _require_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise PlanError(f"plan is a {type(plan).__name__}: read plan files with Plan.load(path)")


def plan_of(model: nn.Module) -> Plan:
    """The plan a compiled model runs with.

    Raises:
        PlanError: the model was not compiled by us, or has not run a training batch yet.
    """
    backend = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(backend, PrecisionBackend) or model._compiled_call_impl is None:
        raise PlanError("this model is not compiled: call precision_compiler.compile(model) first")
    if backend.plan is None:
        raise PlanError("the plan is decided by the first training batch: run one, then ask again")
    return backend.plan
