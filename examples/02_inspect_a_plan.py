"""Look into a plan: what was chosen for one layer, why, and what a larger budget would change."""

import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import precision_compiler


class Perceptron(nn.Module):
    """Two layers that return their own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1024, 4096)
        self.proj = nn.Linear(4096, 1024)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean squared error against `y`."""
        return nn.functional.mse_loss(self.proj(nn.functional.gelu(self.fc(x))), y)


torch.manual_seed(0)
model = Perceptron()
batch = (torch.randn(2048, 1024), torch.randn(2048, 1024))

# Nothing is compiled: a plan for a large GPU can be made on any laptop.
plan = precision_compiler.make_plan(model, batch, target="h100", budget=0.005)
print(f"{plan.predicted_seconds * 1e6:.1f} us per step, fp32 {plan.totals.fp32_seconds * 1e6:.1f}")
print(f"gradient error {plan.predicted_gradient_error:.2g} of {plan.budget.limit:.2g} allowed")
print(Counter(site.format for site in plan.sites.values()))

site = plan.sites["fc.wgrad"]
print(f"\nfc.wgrad computes in {site.format}: {site.reason}")
for name, option in site.options.items():
    verdict = option.veto or f"{option.seconds * 1e6:.2f} us, error {option.error:.2g} on its own"
    print(f"  {name:5} {verdict}")

# A plan is a file. Two of them can be compared site by site.
with tempfile.TemporaryDirectory() as folder:
    plan.save(Path(folder, "plan.json"))
    plan = precision_compiler.Plan.load(Path(folder, "plan.json"))
generous = precision_compiler.make_plan(model, batch, target="h100", budget=0.1)
print("\nwith a budget of 0.1:")
for difference in plan.diff(generous):
    print(f"  {difference.site:22} {difference.before} -> {difference.after}")
