"""What freezing saves: all parameters, LoRA on all layers, LoRA on the upper half.

`make finetune-table`. A small Qwen2 in two stages, each a process; seconds are the median of steps
taken in turns, peaks the larger of the two ranks', counted storage by storage. Planned
are the simulated step, from seconds of its operators measured in one process, and the plan's peak.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

STEPS = 9
WAYS = ("all parameters", "LoRA, all layers", "LoRA, upper half")
LAYERS, MICROBATCHES, LENGTH = 8, 4, 128


def build(way: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=1024,
        vocab_size=2048,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    if way == WAYS[0]:
        return model
    upper = list(range(LAYERS // 2, LAYERS)) if way == WAYS[2] else None
    targets = ["q_proj", "v_proj"]
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=8, target_modules=targets, layers_to_transform=upper
    )
    return get_peft_model(model, adapter)


def pipeline(way: str, plan: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Compiled for the batch beside it, the same on every rank."""
    import pipecompile
    import torch

    torch.manual_seed(0)
    ids = torch.randint(0, 2000, (2 * MICROBATCHES, LENGTH))
    batch = {"input_ids": ids, "labels": ids}
    options = {"microbatches": MICROBATCHES, "optimizer": torch.optim.AdamW, "plan": plan}
    return pipecompile.compile(build(way), 2, example_batch=batch, **options), batch


def measure(plans: dict[str, str]) -> dict[str, dict[str, float]]:
    """As this process's rank: of each way, seconds of a step and bytes at its peak."""
    from support import measured

    pipes = {way: pipeline(way, plan) for way, plan in plans.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(STEPS + 1):
        for way, (pipe, batch) in pipes.items():
            begin = time.perf_counter()
            pipe.step(batch)
            seconds[way].append(time.perf_counter() - begin)
    return {
        way: {"step": statistics.median(seconds[way][1:]), "peak": measured.peak_bytes(*pipes[way])}
        for way in WAYS
    }


def planned(way: str, path: Path) -> dict[str, float]:
    """What the plan says, which is kept for the processes."""
    plan = pipeline(way)[0].plan
    plan.save(path)
    peak = max(stage.memory.peak for stage in plan.stages)
    return {"planned step": plan.step_s, "planned peak": peak}


def main() -> None:
    from bench.finetuning_table import measure as share  # by a name that its processes can import
    from support.gang import Gang

    with TemporaryDirectory() as folder:
        plans = {way: Path(folder, f"{number}.json") for number, way in enumerate(WAYS)}
        found = {way: planned(way, path) for way, path in plans.items()}
        gang = Gang(2)
        ranks = gang.run(share, {way: str(path) for way, path in plans.items()})
        gang.close()
    for way, each in found.items():
        each |= {kind: max(rank[way][kind] for rank in ranks) for kind in ("step", "peak")}
    first = found[WAYS[0]]
    print("| trained | step | planned | ratio | planned | peak of a rank | ratio | planned |")
    print("| --- |" + " --: |" * 7)
    for way, each in found.items():
        cells = [
            f"{each['step'] * 1e3:.0f} ms",
            f"{each['planned step'] * 1e3:.0f} ms",
            f"{each['step'] / first['step']:.2f}",
            f"{each['planned step'] / first['planned step']:.2f}",
            f"{each['peak'] / 2**20:.0f} MiB",
            f"{each['peak'] / first['peak']:.2f}",
            f"{each['planned peak'] / first['planned peak']:.2f}",
        ]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
