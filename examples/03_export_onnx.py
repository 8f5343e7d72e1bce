"""Write a model with its plan as ONNX, and run that file without PyTorch."""

import tempfile
from pathlib import Path

import onnx
import onnxruntime
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

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "model.onnx")
    precision_compiler.export_onnx(model, batch, plan, path)
    nodes = onnx.load(path).graph.node
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: batch[0].numpy()})

casts = sum(node.op_type == "Cast" for node in nodes)
print(f"{len(nodes)} nodes, {casts} of them casts")
model.eval()
with torch.no_grad():
    difference = (torch.from_numpy(logits) - model(batch[0])).abs().max()
print(f"largest difference to PyTorch in fp32: {difference:.2g}")
