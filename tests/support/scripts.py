"""Parts of the scripts that tests run as processes of their own."""

from __future__ import annotations

SMALL = """
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
def loss_fn(out, batch):
    return torch.nn.functional.cross_entropy(out, batch["label"])
pipe = pipecompile.compile(model, 2, microbatches=4, optimizer=torch.optim.SGD, loss_fn=loss_fn)
batch = {"input": torch.ones(8, 4), "label": torch.ones(8, dtype=torch.long)}
pipe.step(batch)
"""
"""Two stages that have taken a step; torch and pipecompile are imported."""
