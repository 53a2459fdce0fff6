"""What a new user tries first: a padding collator, a schedule as long as the data, one script."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import OptionError
from support import jobs, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

LIMIT_S = 120


def texts(count: int = 12) -> list[dict[str, list[int]]]:
    """Of other lengths each."""
    torch.manual_seed(2)
    lengths = (4, 6, 5, 3, 6, 6)
    return [
        {"input_ids": torch.randint(1, 11, (lengths[i % len(lengths)],)).tolist()}
        for i in range(count)
    ]


class Tagger(nn.Module):
    """Says of each token what it is."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: Any) -> Any:
        states = self.inner(self.embed(input_ids)).tanh() * attention_mask[..., None]
        return {"loss": cross_entropy(self.head(states).flatten(0, 1), labels.flatten())}


def pad(samples: Any) -> dict[str, torch.Tensor]:
    """To the longest of a batch, as `DataCollatorWithPadding` does; padding has no label."""
    rows = [torch.tensor(each["input_ids"]) for each in samples]
    padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = padded([torch.ones_like(row) for row in rows])
    return {
        "input_ids": padded(rows),
        "attention_mask": mask,
        "labels": padded(rows, padding_value=-100),
    }


def warmed(optimizer: Any, steps: int) -> Any:
    """Up for a quarter of all steps, then down to nothing."""
    up = max(1, steps // 4)
    rate = lambda step: min((step + 1) / up, (steps - step) / (steps - up + 1))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def train(n_stages: int, dp: int, own: bool = False) -> Any:
    """Two passes with a schedule over all of them: the loader first, and then the pipeline."""
    batches = pipecompile.data.batches(texts(), 4, shuffle=True, collate_fn=pad)
    assert len(batches) == 3
    pipe = pipecompile.compile(
        Tagger(),
        n_stages,
        dp,
        microbatches=2,
        optimizer=jobs.OPTIMIZERS["sgd"],
        lr_scheduler=partial(warmed, steps=2 * len(batches)),
        max_grad_norm=0.5,
        seed=5,
    )
    loader: Any = pipe.loader(batches)
    assert loader is batches
    if own:  # a DataLoader of one's own, by the rows of this replica
        shards, shard = pipe.data_shards, pipe.data_shard
        sampler: Any = DistributedSampler(texts(), shards, shard, shuffle=False)
        loader = DataLoader(texts(), 4 // shards, sampler=sampler, collate_fn=pad)
    losses = [pipe.step(batch) for _ in range(2) for batch in loader]
    return losses, pipe.state_dict(), pipe.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("dp", quickly([2], [1, 2]))
def test_the_schedule_is_as_long_as_the_data(gang: Callable[[int], Gang], dp: int) -> None:
    """And replicas pad to lengths of their own, with the losses of one device."""
    expected = train(1, 1)
    assert expected[2] == pytest.approx(0.0)
    found = [*gang(2).run(train, 2 // dp, dp), train(2 // dp, dp)]
    for losses, state, rate in found:
        assert rate == pytest.approx(0.0)
        for one, other in zip(losses, expected[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
        for name, value in state.items():
            torch.testing.assert_close(value, expected[1][name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_loader_of_ones_own_pads_each_share_too(gang: Callable[[int], Gang]) -> None:
    first, second = gang(2).run(train, 1, 2, True)
    assert plain.equal(first[0], second[0])
    assert plain.equal(first[1], second[1])


def test_batches_know_their_rows_when_there_is_a_pipeline() -> None:
    made = pipecompile.data.batches(texts(), 4, collate_fn=pad)
    with pytest.raises(OptionError, match="knows which rows are its own when"):
        next(iter(made))
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    with pytest.raises(OptionError, match="give them there"):
        pipe.loader(made, 4)
    pipe.loader(made)
    with pytest.raises(OptionError, match="belongs to a pipeline already"):
        pipe.loader(made)
    with pytest.raises(OptionError, match="batch_size=None"):
        pipe.loader(texts())


SCRIPT = """
import torch, pipecompile
from functools import partial
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
rows = torch.randn(20, 8)
batches = pipecompile.data.batches(rows, 8, shuffle=True)
linear = partial(torch.optim.lr_scheduler.LinearLR, total_iters=2 * len(batches))
pipe = pipecompile.compile(
    model, 2, optimizer=partial(torch.optim.AdamW, lr=1e-2), lr_scheduler=linear,
    loss_fn=lambda output, batch: output.square().mean(), microbatches=2,
)
loader = pipe.loader(batches)
stop = pipecompile.Preemption()
for epoch in range(loader.epoch, 2):
    for batch in loader:
        loss = pipe.step(batch)
model = pipe.load_into(model)
if pipe.is_main:
    print(f"{loss.item():.9f} {model(rows).sum().item():.6f} {stop.requested}")
"""


@pytest.mark.slow
def test_one_script_for_python_and_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = [
        subprocess.run(
            [sys.executable, *how, str(script)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=True,
        ).stdout
        for how in ([], torchrun)
    ]
    assert said[0] == said[1]
    assert said[0].strip().endswith("False")
