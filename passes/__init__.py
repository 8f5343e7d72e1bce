"""The compiler's passes, in the order they run."""

if __name__ != "precision_compiler.passes":
    raise ImportError(
        "import this package as precision_compiler.passes: a second copy under the name "
        f"{__name__!r} would have types of its own"
    )

from precision_compiler.passes.analyse.borrow_statistics import BorrowStatistics
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.passes.analyse.raise_flags import RaiseFlags
from precision_compiler.passes.assign.choose_formats import ChooseFormats
from precision_compiler.passes.assign.score_autocast import ScoreAutocast
from precision_compiler.passes.assign.set_budget import SetBudget
from precision_compiler.passes.assign.unify_formats import UnifyFormats
from precision_compiler.passes.cost.check_support import CheckSupport
from precision_compiler.passes.cost.find_kernels import FindKernels
from precision_compiler.passes.cost.price_contractions import PriceContractions
from precision_compiler.passes.cost.price_traffic import PriceTraffic
from precision_compiler.passes.lower.choose_attention import ChooseAttention
from precision_compiler.passes.lower.emulate_formats import EmulateFormats
from precision_compiler.passes.lower.lower_contractions import LowerContractions
from precision_compiler.passes.lower.place_kernels import PlaceKernels
from precision_compiler.passes.lower.place_loss import PlaceLoss
from precision_compiler.passes.lower.spell_out_operands import SpellOutOperands
from precision_compiler.passes.rewrite.delay_reductions import DelayReductions
from precision_compiler.passes.rewrite.fold_casts import FoldCasts
from precision_compiler.passes.rewrite.insert_casts import InsertCasts
from precision_compiler.passes.rewrite.sink_casts import SinkCasts
from precision_compiler.pipeline import Pass

JUDGE: tuple[Pass, ...] = (
    RaiseFlags(),
    CheckSupport(),
    FindKernels(),
    PriceContractions(),
    PriceTraffic(),
    ScoreAutocast(),
    SetBudget(),
    ChooseFormats(),
    UnifyFormats(),
)
"""From statistics to an assignment."""

DECIDE: tuple[Pass, ...] = (MeasureSensitivity(), *JUDGE)
"""From a captured graph to an assignment."""

BORROW: tuple[Pass, ...] = (BorrowStatistics(), *JUDGE)
"""From a graph that cannot be run to an assignment."""

CHOOSE: tuple[Pass, ...] = (ChooseFormats(), UnifyFormats())
"""From corrected predictions to another assignment."""

REWRITE: tuple[Pass, ...] = (
    InsertCasts(),
    SinkCasts(),
    FoldCasts(),
    DelayReductions(),
    ChooseAttention(),
    LowerContractions(),
    PlaceKernels(),
    PlaceLoss(),
    SpellOutOperands(),
    EmulateFormats(),
)
"""From an assignment to the graph that runs."""

EMULATE: tuple[Pass, ...] = (EmulateFormats(everything=True),)
"""From an assignment to a graph with its exact numerics on any machine."""

DEFAULT: tuple[Pass, ...] = DECIDE + REWRITE

__all__ = ["BORROW", "CHOOSE", "DECIDE", "DEFAULT", "EMULATE", "JUDGE", "REWRITE"]
