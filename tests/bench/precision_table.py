"""What `precision="bf16"` brings: casts, bytes and seconds. Prints Markdown.

`make precision-table` runs it; names of tables (casts, bytes, steps) as arguments choose among
them.

casts   operators that one step runs to change a floating-point dtype, counted while they run,
        under `torch.autocast` on one device and under pipecompile
bytes   what the plan says, fp32 against bf16
steps   two real processes of one thread each over gloo, paired: all take turns within one round,
        and a ratio is the median of the rounds' ratios
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pipecompile
import torch
from pipecompile.compiler.ir import ops
from pipecompile.compiler.memory.meter import StorageMeter

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

from bench import models
from support import plain, rivals
from support.gang import Gang

STAGES, MICROBATCHES = 2, 8
ROWS = 2 * MICROBATCHES
WARM_UP, ROUNDS = 2, 15
BF16 = torch.bfloat16
NARROW_BOUNDARY = pipecompile.Precision(compute=BF16, boundary=BF16)
ATTENTION_IN_FP32 = pipecompile.Precision(compute=BF16, fp32=("scaled_dot_product_attention",))


def compiled(name: str, precision: str | pipecompile.Precision) -> pipecompile.Pipeline:
    return pipecompile.compile(
        models.build(name),
        STAGES,
        microbatches=MICROBATCHES,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        tied_grads="per_step",
        example_batch=models.batch(ROWS),
        costs="roofline",
        precision=precision,
    )


# -- casts ----------------------------------------------------------------------------------------


class Casts(Counter[str]):
    """Counts the operators that change a floating-point dtype.

    cast     makes a value in another dtype
    weight   writes the copy of a weight in the compute dtype
    slot     writes the first gradient of a step into its fp32 slot
    sum      adds values of two dtypes, which casts one of them inside the operator
    """

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = op(*args, **kwargs)
        if op is torch.ops.aten._to_copy.default:
            self["cast"] += _differ(args[0], made)
        elif op is torch.ops.aten.copy_.default and _differ(*args[:2]):
            self["slot" if args[0].dtype is torch.float32 else "weight"] += 1
        elif op in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self["sum"] += _differ(*args[:2])
        return made


def _differ(first: Any, second: Any) -> bool:
    """Whether both are floating-point tensors, of two dtypes."""
    both = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    floats = both and first.is_floating_point() and second.is_floating_point()
    return floats and first.dtype is not second.dtype


def counted(run: Callable[[], Any]) -> Casts:
    casts = Casts()
    with StorageMeter(casts.call):
        run()
    return casts


def autocast_step(model: torch.nn.Module) -> None:
    """Forward and backward of a step on one device, as the documentation of torch.amp has it."""
    for piece in plain.cut(models.batch(ROWS), MICROBATCHES):
        with torch.autocast("cpu", BF16):
            loss = model(**piece).loss
        (loss / MICROBATCHES).backward()


def casts_table() -> None:
    print(
        f"Casts in a step of {MICROBATCHES} microbatches, bf16\n\n"
        "| model | autocast | pipecompile | fewer | in programs | of weights | of first gradients "
        "| sums of two dtypes, autocast | pipecompile |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name in models.MODELS:
        theirs = counted(functools.partial(autocast_step, models.build(name)))
        pipe = compiled(name, "bf16")
        ops.PIECE = sys.maxsize  # one addition per gradient, to count them
        ours = counted(functools.partial(pipe.forward_backward, models.batch(ROWS)))
        first, second = (casts.total() - casts["sum"] for casts in (theirs, ours))
        print(
            f"| {name} | {first} | {second} | {first / second:.1f}× | {ours['cast']} "
            f"| {ours['weight']} | {ours['slot']} | {theirs['sum']} | {ours['sum']} |",
            flush=True,
        )


# -- bytes ----------------------------------------------------------------------------------------


def autograd_stash(name: str) -> int:
    """Bytes that autograd saves of a microbatch under autocast, but for weights and their casts."""
    model = models.build(name)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    matrices = [p.detach().to(BF16) for p in model.parameters() if p.dim() > 1]
    casts = [cast for matrix in matrices for cast in (matrix, matrix.mT)]
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alike = (c for c in casts if c.shape == tensor.shape and c.dtype is tensor.dtype)
        if storage.data_ptr() not in held and not any(torch.equal(tensor, c) for c in alike):
            saved[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    piece = plain.cut(models.batch(ROWS), MICROBATCHES)[0]
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with torch.autocast("cpu", BF16), hooks:
        model(**piece)
    return sum(storage.nbytes() for storage in saved.values())


def bytes_table() -> None:
    print(
        "MiB of each stage, predicted: what a microbatch keeps from its forward for its backward, "
        "what it sends, also with bf16 at the boundary, and the peak with AdamW's states. "
        "Autograd: what it saves of the same microbatch of the whole model under torch.autocast\n\n"
        "| model | stash, fp32 | bf16 | bf16 : fp32 | bf16 : autograd | sent, fp32 | bf16 "
        "| boundary=bf16 | peak, fp32 | bf16 | largest, bf16 : fp32 |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name in models.MODELS:
        plans = [compiled(name, precision).plan for precision in ("fp32", "bf16", NARROW_BOUNDARY)]
        stash = [[s.stash_bytes for s in plan.stages] for plan in plans[:2]]
        sent = [[sum(t.bytes for t in s.sends) for s in plan.stages] for plan in plans]
        peak = [[s.memory.peak for s in plan.stages] for plan in plans[:2]]
        mixed = sum(stash[1])
        cells = [*map(_mib, stash), f"{mixed / sum(stash[0]):.0%}"]
        cells += [f"{mixed / autograd_stash(name):.0%}", *map(_mib, sent)]
        cells += [*map(_mib, peak), f"{max(peak[1]) / max(peak[0]):.0%}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def params_table() -> None:
    """The same of parameters that are cast, beside operators."""
    print(
        "| model | stash, bf16 | bf16_params | bf16_params : fp32 | sent, bf16 | bf16_params "
        "| peak, bf16 | bf16_params | largest, bf16_params : fp32 |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name in models.MODELS:
        plans = [compiled(name, precision).plan for precision in ("fp32", "bf16", "bf16_params")]
        stash, sent, peak = (
            [[value(stage) for stage in plan.stages] for plan in plans]
            for value in (
                lambda stage: stage.stash_bytes,
                lambda stage: sum(each.bytes for each in stage.sends),
                lambda stage: stage.memory.peak,
            )
        )
        cells = [*map(_mib, stash[1:]), f"{sum(stash[2]) / sum(stash[0]):.0%}"]
        cells += [*map(_mib, sent[1:]), *map(_mib, peak[1:])]
        print(f"| {name} | {' | '.join(cells)} | {max(peak[2]) / max(peak[0]):.0%} |", flush=True)


def _mib(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size / 2**20:.2f}" for size in sizes)


# -- steps ----------------------------------------------------------------------------------------

BASE = "pipecompile bf16"
SIZES = {str(size): size for size in (rivals.NARROW, rivals.WIDE)}


@functools.cache
def contestants(size: rivals.Size) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Name -> a function that sets up one training step."""
    front_end = functools.partial(rivals.by_front_end, size)
    hands = {
        f"by hand, {layers} + {size.layers - layers} layers": functools.partial(
            rivals.by_hand, layers, size
        )
        for layers in sorted({size.equal, size.balanced})
    }
    stages = {"its front end": front_end} | hands
    compiled = functools.partial(rivals.compiled, "1f1b", size)
    return {
        BASE: functools.partial(compiled, "bf16"),
        "pipecompile bf16, attention in fp32": functools.partial(compiled, ATTENTION_IN_FP32),
        "pipecompile fp32": functools.partial(compiled, "fp32"),
    } | {
        f"torch 1F1B, autocast, {how}": functools.partial(rivals.pipelining, make, BF16)
        for how, make in stages.items()
    }


def step(size: str, name: str) -> float:
    """Seconds of one step, as this process's rank."""
    return rivals.timed(contestants(SIZES[size])[name])


def steps_table(rounds: int) -> None:
    from bench.precision_table import step as share  # by a name that its processes can import

    for size in SIZES:
        gang = Gang(STAGES)
        seconds: dict[str, list[float]] = {name: [] for name in contestants(SIZES[size])}
        for i in range(WARM_UP + rounds):
            for name, times in seconds.items():
                took = max(gang.run(share, size, name))
                if i >= WARM_UP:
                    times.append(took)
        gang.close()
        print(
            f"Step of a GPT-2-like model of {size} layers × width, {rivals.ROWS} × "
            f"{rivals.LENGTH} tokens, {rivals.MICROBATCHES} microbatches, medians of {rounds} "
            f"rounds\n\n| | step | {BASE} is |\n|---|--:|--:|"
        )
        for name, times in seconds.items():
            faster = median(b / a for a, b in zip(seconds[BASE], times, strict=True))
            shown = "" if name == BASE else f"{faster:.2f}× as fast"
            print(f"| {name} | {median(times) * 1e3:.0f} ms | {shown} |")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Casts, bytes and seconds of bf16.")
    tables = ("casts", "bytes", "params", "steps")
    parser.add_argument("tables", nargs="*", default=tables, metavar="|".join(tables))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the timings")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(tables):
        parser.error(f"no table {sorted(unknown)[0]!r}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if "casts" in args.tables:
        casts_table()
        print()
    if "bytes" in args.tables:
        bytes_table()
        print()
    if "params" in args.tables:
        params_table()
        print()
    if "steps" in args.tables:
        steps_table(args.rounds)


if __name__ == "__main__":
    main()
