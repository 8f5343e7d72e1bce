"""Random plans: something of everything that a plan file may hold."""

from hypothesis import strategies as st

from precision_compiler.budget import Budget
from precision_compiler.calibrated import Calibrated
from precision_compiler.flags import FLAGS, Flag
from precision_compiler.formats import FORMATS
from precision_compiler.journal import JournalEntry
from precision_compiler.outcomes import MeasuredError, Totals, Trial, Verification
from precision_compiler.plan import SCHEMA_VERSION, NodeChoice, Option, Plan, SiteChoice

words = st.text(max_size=12)
amounts = st.floats(0, allow_nan=False, allow_infinity=False)
formats = st.sampled_from(list(FORMATS))
sites = st.builds(
    SiteChoice,
    kind=st.sampled_from(["contraction", "storage"]),
    role=st.sampled_from(["fprop", "dgrad", "wgrad", "store"]),
    op=words,
    signature=words,
    shape=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    format=formats,
    reason=words,
    seconds=amounts,
    error=amounts,
    variance_share=amounts,
    options=st.dictionaries(
        formats, st.builds(Option, amounts, amounts, st.none() | words), max_size=2
    ),
)
signed = st.floats(allow_nan=False, allow_infinity=False)
budgets = st.builds(
    Budget,
    asked=words,
    limit=amounts,
    origin=words,
    bound_by=st.sampled_from(["number", "autocast", "noise", "trust region", "nothing yet"]),
    noise_factor=st.none() | amounts,
    autocast=st.none() | amounts,
    noise=st.none() | amounts,
    noise_origin=words,
)
measured = st.builds(
    MeasuredError,
    gradient_error=amounts,
    predicted_gradient_error=amounts,
    tensor_error=amounts,
    tensors=st.dictionaries(words, amounts, max_size=2),
    zero_gradients=st.lists(words, max_size=2).map(tuple),
    loss=signed,
    loss_error=signed,
    predicted_loss_sigma=amounts,
)
verifications = st.builds(
    Verification,
    measured,
    held_out=st.booleans(),
    rounds=st.integers(1, 4),
    raised=st.dictionaries(words, st.dictionaries(words, amounts, max_size=2), max_size=2),
    passed=st.booleans(),
)
flags = st.builds(
    Flag,
    name=st.sampled_from(list(FLAGS)),
    site=words,
    format=st.none() | formats,
    sentence=words,
    numbers=st.dictionaries(words, signed, max_size=2),
    veto=st.booleans(),
)
labels = ("plan", "fp32", "autocast")
trials = st.builds(
    Trial,
    seconds=st.fixed_dictionaries(dict.fromkeys(labels, amounts)),
    winner=st.sampled_from(labels),
    sentence=words,
    prices=st.fixed_dictionaries(dict.fromkeys(labels, amounts)),
    anchors=st.lists(st.sampled_from(labels), unique=True).map(tuple),
)
totals = st.builds(
    Totals,
    *[amounts] * 7,
    casts=st.integers(0, 9),
    predicted_loss_sigma=amounts,
    predicted_tensor_error=st.none() | amounts,
    gradient_norm=amounts,
    loss=signed,
    batches=st.integers(1, 9),
    calibrated=st.none() | st.builds(Calibrated, amounts, amounts),
)
nodes = st.builds(
    NodeChoice,
    *(words, words, st.none() | words, words, words, words, amounts, amounts),
    vetoes=st.dictionaries(formats, words, max_size=2),
)
plans = st.builds(
    Plan,
    schema_version=st.just(SCHEMA_VERSION),
    target=words,
    budget=budgets,
    fingerprint=words,
    loss_origin=words,
    versions=st.dictionaries(words, words, max_size=2),
    totals=totals,
    sites=st.dictionaries(words, sites, max_size=3),
    nodes=st.lists(nodes, max_size=2).map(tuple),
    journal=st.lists(
        st.builds(JournalEntry, words, words, amounts, st.integers(0), st.integers(0)), max_size=2
    ).map(tuple),
    flags=st.lists(flags, max_size=2).map(tuple),
    verification=st.none() | verifications,
    trial=st.none() | trials,
)
