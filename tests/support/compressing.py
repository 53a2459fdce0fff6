"""What tests of compression share: a training of a few steps, and what a rank is left with."""

from __future__ import annotations

from typing import Any

import torch

from support import jobs, models, plain

METHODS = ("bf16", "int8", "powersgd:2", "adacomp:64")
ROWS = 8  # of a global batch


def pipeline(compress: Any, n_stages: int = 1, dp: int = 2, **options: Any) -> Any:
    """A GPT-2 with tied embeddings, compiled for batches of `ROWS` rows."""
    microbatches = options.pop("microbatches", 2)
    pipe = jobs.pipeline("gpt2", n_stages, dp, microbatches, compress=compress, **options)
    pipe.compile_for(shares(pipe, 1)[0])
    return pipe


def shares(pipe: Any, count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """This process's part of so many batches, from one of them on."""
    batches = models.batches("gpt2", ROWS, first + count)[first:]
    return [plain.cut(batch, pipe.data_shards)[pipe.data_shard] for batch in batches]


def residues(pipe: Any) -> dict[tuple[int, str], torch.Tensor]:
    """(rank, FQN) -> what it has kept, of the ranks of this process."""
    found = pipe._require().state.compressed
    return {(r, n): t.clone() for r, each in found.items() for n, t in each.residues.items()}


def held(pipe: Any) -> dict[tuple[int, str], torch.Tensor]:
    """(rank, FQN) -> the parameter that it computes with."""
    ranks = pipe._require().state.ranks
    return {(r, n): p.detach().clone() for r, each in ranks.items() for n, p in each.params.items()}


def train(compress: Any, n_stages: int, dp: int, steps: int = 3, **options: Any) -> Any:
    """(losses, state, what ranks of this process compute with, what they have kept, bytes)."""
    pipe = pipeline(compress, n_stages, dp, max_grad_norm=1.0, **options)
    losses = [pipe.step(share) for share in shares(pipe, steps)]
    before = pipe._world.transport.sent_bytes
    losses.append(pipe.step(shares(pipe, 1, steps)[0]))
    sent = pipe._world.transport.sent_bytes - before
    return losses, pipe.state_dict(), held(pipe), residues(pipe), sent


def save(folder: str, compress: Any, n_stages: int, dp: int) -> Any:
    """Two steps, a checkpoint, two more; their losses, the state, and what was kept when saved."""
    pipe = pipeline(compress, n_stages, dp)
    for share in shares(pipe, 2):
        pipe.step(share)
    kept = residues(pipe)
    pipe.save(folder)
    losses = [pipe.step(share) for share in shares(pipe, 2, 2)]
    return losses, pipe.state_dict(), kept


def resume(folder: str, compress: Any, n_stages: int, dp: int) -> Any:
    """Load that, and the two more steps."""
    pipe = pipeline(compress, n_stages, dp)
    assert pipe.load(folder) == 2
    kept = residues(pipe)
    losses = [pipe.step(share) for share in shares(pipe, 2, 2)]
    return losses, pipe.state_dict(), kept
