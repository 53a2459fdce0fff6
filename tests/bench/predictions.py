"""Does what the plan predicts come true? Prints a table; `make predictions` runs it.

For every setting, real processes over gloo train with measured prices. The plan's step time is
compared with the median of the steps, its peak memory with the live tensor storage that a
dispatch mode counts during a step, its order of stages by load with their measured busy times.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[1]))
STEPS = 9
LENGTH = 128
VOCABULARY = 4096


@dataclass(frozen=True)
class Setting:
    model: str
    n_stages: int
    microbatches: int
    remat: str
    share: float | None = None
    """Budget between what full recomputation needs (0) and none (1)."""

    def __str__(self) -> str:
        budget = "" if self.share is None else f", {self.share:.0%} of the stash"
        return f"{self.model}, {self.n_stages} stages, {self.microbatches} mb, {self.remat}{budget}"


SETTINGS = [
    Setting("gpt2", 2, 8, "none"),
    Setting("gpt2", 2, 4, "full"),
    Setting("gpt2", 2, 8, "auto", 0.4),
    Setting("llama", 2, 8, "none"),
    Setting("llama", 2, 8, "auto", 0.3),
    Setting("llama", 1, 4, "none"),
    Setting("bert", 2, 16, "none"),
    Setting("t5", 2, 8, "full"),
]


@dataclass(frozen=True)
class Found:
    """What one process has measured."""

    step_s: float
    predicted_s: float
    peak_bytes: int
    predicted_bytes: int
    busy_s: float
    predicted_busy_s: float


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_layer=8, n_embd=256, n_head=8, vocab_size=VOCABULARY, n_positions=LENGTH
            )
        )
    if name == "llama":
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(
                num_hidden_layers=6,
                hidden_size=320,
                intermediate_size=864,
                num_attention_heads=8,
                num_key_value_heads=4,
                vocab_size=VOCABULARY,
            )
        )
    if name == "bert":
        return hf.BertForMaskedLM(
            hf.BertConfig(
                num_hidden_layers=6,
                hidden_size=384,
                intermediate_size=1536,
                num_attention_heads=6,
                vocab_size=VOCABULARY,
            )
        )
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=256,
            d_ff=1024,
            num_layers=4,
            num_heads=8,
            d_kv=32,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        )
    )


def measure(setting: Setting, cache: str) -> Found:
    """Train as this process's rank."""
    import pipecompile
    from pipecompile.compiler.meter import StorageMeter
    from pipecompile.runtime.executor import Executor

    torch.set_num_threads(1)
    os.environ["PIPECOMPILE_CACHE"] = cache
    rows = 2 * setting.microbatches
    ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone()}

    def compiled(**options: Any) -> Any:
        return pipecompile.compile(
            build(setting.model),
            setting.n_stages,
            microbatches=setting.microbatches,
            optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
            max_grad_norm=1.0,
            tied_grads="per_step",
            example_batch=batch,
            costs="profile",
            **options,
        )

    memory = None
    if setting.share is not None:
        low, high = (
            max(stage.memory.peak for stage in compiled(remat=remat).plan.stages)
            for remat in ("full", "none")
        )
        memory = int(low + setting.share * (high - low))
    pipe = compiled(remat=setting.remat, memory=memory)
    rank = dist.get_rank()
    stage = pipe.plan.stages[rank]
    busy: list[float] = []
    original = Executor._compute

    def timed(self: Executor, *args: Any) -> None:
        start = time.perf_counter()
        original(self, *args)
        busy.append(time.perf_counter() - start)

    for _ in range(2):
        pipe.step(batch)
    steps = []
    Executor._compute = timed  # type: ignore[method-assign]
    for _ in range(STEPS):
        dist.barrier()
        start = time.perf_counter()
        pipe.step(batch)
        steps.append(time.perf_counter() - start)
    Executor._compute = original  # type: ignore[method-assign]
    meter = StorageMeter()
    meter.hold(held(pipe, batch))
    with meter:
        pipe.step(batch)
    predicted_busy = stage.forward_s + stage.backward_s + stage.recompute_s
    return Found(
        median(steps),
        pipe.plan.step_s,
        meter.peak_bytes,
        stage.memory.peak,
        sum(busy) / STEPS,
        predicted_busy * setting.microbatches,
    )


def held(pipe: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What a process holds between steps."""
    tensors = list(batch.values())
    for rank in pipe._state.ranks.values():
        tensors += [*rank.params.values(), *rank.buffers.values(), *rank.grads.buffers.values()]
    for states in pipe.optimizer.state.values():
        tensors += [value for value in states.values() if isinstance(value, torch.Tensor)]
    for loaded in pipe._loaded.values():
        for executor in loaded.executors.values():
            for bound in executor.bound.values():
                tensors += [value for value in bound.fixed if isinstance(value, torch.Tensor)]
    return tensors


def main() -> None:
    from support.gang import Gang

    lines = [
        f"{'setting':48} {'step ms':>9} {'predicted':>9} {'error':>7}  "
        "peak MiB by stage (measured, predicted, error)        load order"
    ]
    print(lines[0])
    errors, memory_errors, orders = [], [], []
    with tempfile.TemporaryDirectory() as cache:
        for setting in SETTINGS:
            gang = Gang(setting.n_stages)
            found = gang.run("bench.predictions:measure", setting, cache)
            gang.close()
            step_s = median(each.step_s for each in found)
            errors.append(found[0].predicted_s / step_s - 1)
            peaks = []
            for each in found:
                memory_errors.append(each.predicted_bytes / each.peak_bytes - 1)
                peaks.append(
                    f"{each.peak_bytes / 2**20:6.1f} {each.predicted_bytes / 2**20:6.1f} "
                    f"{memory_errors[-1]:+.1%}"
                )
            stages = range(len(found))
            real = sorted(stages, key=lambda s: found[s].busy_s)
            orders.append(real == sorted(stages, key=lambda s: found[s].predicted_busy_s))
            ratio = found[0].busy_s / found[-1].busy_s
            print(
                f"{setting!s:48} {step_s * 1e3:9.1f} {found[0].predicted_s * 1e3:9.1f} "
                f"{errors[-1]:+7.1%}  {'; '.join(peaks):54} "
                f"{'right' if orders[-1] else 'wrong'} (first/last {ratio:.2f})",
                flush=True,
            )
    print(
        f"median error of the step {median(map(abs, errors)):.1%}, "
        f"largest {max(map(abs, errors)):.1%}; "
        f"largest error of the peak {max(map(abs, memory_errors)):.1%}; "
        f"order of load right in {sum(orders)} of {len(orders)}"
    )


if __name__ == "__main__":
    main()
