"""Models without weights: capture what does not fit, and borrow what cannot be measured."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from precision_compiler.formats import CHOICES, Format, relative_variance
from precision_compiler.plan import Plan, SiteChoice
from precision_compiler.scaling import hardware_format, is_stochastic
from precision_compiler.sites import Site
from precision_compiler.statistics import Sensitivity, unweighted


def has_no_weights(model: nn.Module) -> bool:
    """Whether any parameter or buffer is on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def on_paper(model: nn.Module, batch: Any) -> tuple[nn.Module, Any]:
    """A copy of a model and its batch whose tensors have sizes, a device, and no contents.

    They claim to be on the CPU, so that the graph is the one which a real model gives there:
    on the meta device itself, torch picks other operations for attention.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def pretend(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        elements = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        )
        made = FakeTensor(mode, elements, torch.device("cpu"))
        if isinstance(value, nn.Parameter):
            return nn.Parameter(made, requires_grad=value.requires_grad)
        return made

    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): pretend(tensor) for tensor in tensors})
    return twin, pytree.tree_map(pretend, batch)


@dataclass(frozen=True)
class Borrowed(Sensitivity):
    """A sensitivity that was not measured here: nothing but a variance for every format.

    Attributes:
        variances: relative variance of the gradient by format name.
    """

    variances: Mapping[str, float] = field(default_factory=dict)

    def variance(self, fmt: Format, drift: int = 0, metric: int = 0) -> float:
        """The variance that was borrowed; only that of the gradient is known."""
        return self.variances.get(fmt.name, 0.0) if metric == 0 else 0.0

    @property
    def is_silent(self) -> bool:
        """Never: what was not measured may matter."""
        return False


def borrowed(variances: Mapping[str, float]) -> Borrowed:
    """A borrowed sensitivity of a tensor of which no values are known."""
    return Borrowed(unweighted(), 0.0, variances=variances)


@dataclass(frozen=True)
class Loan:
    """Where the error of one site comes from.

    Attributes:
        variances: relative variance of the gradient by format.
        vetoes: why formats are ruled out.
        lender: name of the site that lent it; None for the formats' own closed form.
    """

    variances: Mapping[str, float]
    vetoes: Mapping[str, str]
    lender: str | None


def lend(sites: Sequence[Site], formats: Iterable[str], sibling: Plan | None) -> dict[str, Loan]:
    """The error of every site, from a plan for a smaller sibling or from the formats alone.

    1. Sites of one pattern (their names with every number replaced) form a stack of layers. A
       site borrows from the sibling's site of the same pattern at the same relative depth.
    2. A gradient's squared norm is spread over the layers, and so is what rounding adds to it:
       variances are divided by how many times deeper the stack is here.
    3. A recipe that the sibling's plan did not know errs as its format does, more so where
       gradients are rounded stochastically.
    4. What the sibling lacks gets the closed form: each of a contraction's two operands, or a
       stored tensor, errs as numbers of all sizes do (``relative_variance``), and that reaches the
       layer's own share of the gradient undiminished.
    """
    here = _stacks(site.name for site in sites)
    depth = {name: place for stack in here.values() for place, name in enumerate(stack)}
    there = _stacks(sibling.sites) if sibling is not None else {}
    found: dict[str, Loan] = {}
    for site in sites:
        stack = here[_pattern(site.name)]
        lenders = there.get(_pattern(site.name), [])
        if sibling is None or not lenders:
            found[site.name] = _from_formats(site, formats, len(stack))
            continue
        lender = lenders[_same_depth(depth[site.name], len(stack), len(lenders))]
        share = len(lenders) / len(stack)
        found[site.name] = _from_site(lender, sibling.sites[lender], share, formats)
    return found


def _from_formats(site: Site, formats: Iterable[str], layers: int) -> Loan:
    operands = 2 if site.kind == "contraction" else 1
    variances = {
        name: operands * relative_variance(CHOICES[name]) * _growth(name, site.role) / layers
        for name in formats
        if name != "fp32"
    }
    return Loan(variances, {}, None)


def _growth(name: str, role: str) -> float:
    """Variance of a recipe over its format's: twice as large if one of two operands is drawn."""
    return 1.5 if is_stochastic(name) and role in ("dgrad", "wgrad") else 1.0


def _from_site(name: str, choice: SiteChoice, share: float, formats: Iterable[str]) -> Loan:
    options = choice.options.items()
    known = {fmt: option.error**2 * share for fmt, option in options}
    recipes = (fmt for fmt in formats if fmt not in known and hardware_format(fmt) in known)
    return Loan(
        known | {fmt: known[hardware_format(fmt)] * _growth(fmt, choice.role) for fmt in recipes},
        {fmt: option.veto for fmt, option in options if option.veto is not None},
        name,
    )


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def _stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by pattern, in their order; backward sites come in the order of the numbers too."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stacks[_pattern(name)].append(name)
    for stack in stacks.values():
        stack.sort(key=lambda name: [int(part) for part in re.findall(r"(?<!\w)\d+(?!\w)", name)])
    return dict(stacks)


def _same_depth(place: int, layers: int, other: int) -> int:
    return round(place * (other - 1) / (layers - 1)) if layers > 1 else 0
