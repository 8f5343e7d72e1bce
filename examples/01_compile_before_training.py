"""Train a Transformer with a plan: one call before the first step, nothing else changes."""

import torch
from torch import nn

import precision_compiler

STEPS = 30


class Classifier(nn.Module):
    """Tells which of eight tokens a sequence repeats most often."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 128)
        self.layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.head = nn.Linear(128, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits, one row for each sequence."""
        return self.head(self.layer(self.embed(tokens)).mean(dim=1))


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences and their most frequent token."""
    tokens = torch.randint(8, (32, 64))
    counts = nn.functional.one_hot(tokens, 8).sum(dim=1)
    return tokens, counts.argmax(dim=1)


torch.manual_seed(0)
model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens, labels = make_batch()

# The one line. The model stays the same object: its parameters, its state_dict and the optimizer
# above are untouched. Here the model returns logits, so the loss is given.
precision_compiler.compile(
    model, (tokens,), loss=lambda logits, batch: nn.functional.cross_entropy(logits, labels)
)

for step in range(STEPS):
    tokens, labels = make_batch()
    loss = nn.functional.cross_entropy(model(tokens), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:2}: loss {loss.item():.3f}")

plan = precision_compiler.plan_of(model)
print(f"gradient error of the plan: {plan.predicted_gradient_error:.2g} predicted")
