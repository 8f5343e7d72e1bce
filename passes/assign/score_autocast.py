"""See ScoreAutocast."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from precision_compiler.graph import contraction_rule, is_float32, is_movement, value_of
from precision_compiler.pipeline import Numerics, Unit


@dataclass(frozen=True)
class ScoreAutocast:
    """Write the bf16 policy of ``torch.autocast`` as an assignment and score it.

    The policy: contractions run in bf16 and return bf16; every other operation runs in the
    widest dtype among its inputs, parameters being float32. So the dtype of each tensor follows
    from type promotion through the graph:

    1. Results of contractions are bf16.
    2. A pointwise operation on bf16 tensors alone gives bf16; one float32 tensor makes it float32.
    3. Reductions return float32 (losses and normalisations are in autocast's float32 list).
    4. A gradient has the dtype of the tensor it belongs to, which the same promotion gives it.
    """

    name: ClassVar[str] = "score-autocast"
    reads: ClassVar[frozenset[str]] = frozenset(
        {"statistics", "vetoes", "contraction prices", "traffic prices"}
    )
    makes: ClassVar[frozenset[str]] = frozenset({"baseline"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.baseline``."""
        unit.baseline = autocast_assignment(unit)
        unit.expect_flips(unit.problem.flip_slope(unit.baseline))
        error = unit.problem.error(unit.baseline)
        unit.journal.note(self.name, f"the bf16 policy of torch.autocast errs by {error:.3g}")
        return False


def autocast_assignment(unit: Unit) -> dict[str, str]:
    """The policy over the unit's sites; float32 everywhere on a target without bf16."""
    if "bf16" not in unit.target.formats:
        return unit.problem.uniform()
    formats = dict.fromkeys(unit.links.contractions, "bf16")
    narrow: dict[fx.Node, bool] = {}
    by_node = {site.node: name for name, site in unit.links.stores.items()}
    for node in unit.joint.module.graph.nodes:
        narrow[node] = _is_narrow(node, narrow)
        store = by_node.get(node.name)
        if store is not None:
            formats[store] = "bf16" if narrow[node] else "fp32"
    return {site.name: formats[site.name] for site in unit.joint.sites}


def _is_narrow(node: fx.Node, narrow: Mapping[fx.Node, bool]) -> bool:
    if node.op != "call_function":
        return False
    if contraction_rule(node) is not None:
        return True
    if torch.Tag.reduction in getattr(node.target, "tags", ()):
        return False
    sources = [source for source in node.all_input_nodes if _counts(source)]
    if is_movement(node) or not sources:
        return bool(sources) and narrow[sources[0]]
    return all(narrow[source] for source in sources)


def _counts(source: fx.Node) -> bool:
    """Whether a tensor takes part in type promotion: zero-dimensional ones do not."""
    value = value_of(source)
    if value is None:  # a tuple of results passes on what its producer returns
        return contraction_rule(source) is not None or is_movement(source)
    return is_float32(source) and value.dim() > 0
