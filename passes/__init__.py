"""The compiler's passes, in the order they run."""

if __name__ != "precision_compiler.passes":
    raise ImportError(
        "import this package as precision_compiler.passes: a second copy under the name "
        f"{__name__!r} would have types of its own"
    )

from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.passes.analyse.veto_ranges import VetoRanges
from precision_compiler.passes.assign.choose_formats import ChooseFormats
from precision_compiler.passes.assign.score_autocast import ScoreAutocast
from precision_compiler.passes.cost.price_contractions import PriceContractions
from precision_compiler.passes.cost.price_traffic import PriceTraffic
from precision_compiler.passes.lower.round_operands import RoundOperands
from precision_compiler.passes.rewrite.fold_casts import FoldCasts
from precision_compiler.passes.rewrite.insert_casts import InsertCasts
from precision_compiler.passes.rewrite.sink_casts import SinkCasts
from precision_compiler.pipeline import Pass

DECIDE: tuple[Pass, ...] = (
    MeasureSensitivity(),
    VetoRanges(),
    PriceContractions(),
    PriceTraffic(),
    ScoreAutocast(),
    ChooseFormats(),
)
"""From a captured graph to an assignment."""

REWRITE: tuple[Pass, ...] = (
    InsertCasts(),
    SinkCasts(),
    FoldCasts(),
    RoundOperands(),
)
"""From an assignment to the graph that runs."""

DEFAULT: tuple[Pass, ...] = DECIDE + REWRITE

__all__ = ["DECIDE", "DEFAULT", "REWRITE"]
