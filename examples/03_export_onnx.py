"""Write a model with its plan as ONNX, and read the plan back from the file's annotations."""

import tempfile
from pathlib import Path

import onnx
import torch
from torch import nn

import precision_compiler


class Tagger(nn.Module):
    """One Transformer layer and a projection: a tag for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 128)
        self.layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits, one row for each token."""
        return self.head(self.layer(self.embed(tokens)))


def loss(logits: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Any scalar that training would minimise; here tags are the tokens' last digits."""
    return nn.functional.cross_entropy(logits.transpose(1, 2), batch[0] % 10)


torch.manual_seed(0)
model = Tagger()
batch = (torch.randint(100, (8, 64)),)
plan = precision_compiler.make_plan(model, batch, loss=loss)

# The file is checked, and run once, before it appears under its name.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "model.onnx")
    report = precision_compiler.export_onnx(model, batch, plan, path)
    nodes = onnx.load(path).graph.node
print(f"{report.nodes} nodes, {report.casts} of them casts")
print(
    f"{report.evaluator} differs from PyTorch by {report.max_difference:.2g}, same formats in both"
)

# Every node says which site of the plan it carries out, in which formats and why.
for node in nodes:
    notes = {entry.key.rpartition(".")[2]: entry.value for entry in node.metadata_props}
    if notes.get("site", "").endswith(".fprop"):
        formats = f"{notes['compute_format']} -> {notes['storage_format']}"
        print(f"{notes['site']:28} {node.op_type:10} {formats}")
