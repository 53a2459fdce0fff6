"""Predicted speeds of training runs that somebody has published; `make published`.

    python tests/bench/published.py FOLDER [--rows 3,17] [--json FILE]

FOLDER has throughput.csv: MPT decoders (llm-foundry's benchmarking tables), trained by FSDP on 8 to
512 devices. Every row is planned as a user would plan it: the model is built without data and
captured, n_stages=1, zero= and remat= as it ran, costs="calibrated". No weights are made. Graphs
are kept on disk (PIPECOMPILE_CACHE), so that a second call takes a fraction of the first.

Blocks repeat, so two depths tell all: seconds and bytes of every further block are those between
`SHALLOW`'s two. A block more is one more gather, one more scatter and the same operators; blocks at
the two ends, whose gathers nothing precedes, are in both. `--whole` captures all blocks instead.

A run that would not fit with whole logits is planned with chunked_loss=. That is not what ran:
there a fused kernel needed neither a second copy of the logits nor another product for them.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

SHALLOW = 3, 4
"""Numbers of blocks: enough for one to be fetched, one computed and one already let go."""
DEVICES = {"h100_80gb": "h100", "a100_80gb": "a100", "a100_40gb": "a100-40gb"}
LEVELS = {"FULL_SHARD": 3, "SHARD_GRAD_OP": 2}
CHUNK_ROWS = 8192
GIB = 2**30
WORKERS = 2


@dataclass(frozen=True)
class Run:
    """A published one; names as in the file's columns."""

    number: int
    model: str
    d_model: int
    n_heads: int
    n_layers: int
    vocab: int
    seq: int
    gpu: str
    n_gpus: int
    rows_per_gpu: int
    grad_accum: int
    recompute: bool
    precision: str
    sharding: str
    tokens_per_s_per_gpu: float

    @staticmethod
    def of(number: int, row: dict[str, str]) -> Run:
        whole = "d_model", "n_heads", "n_layers", "vocab", "seq", "n_gpus", "rows_per_gpu"
        return Run(
            number,
            row["model"],
            *(int(row[name]) for name in whole[:5]),
            row["gpu"],
            *(int(row[name]) for name in (*whole[5:], "grad_accum")),
            row["recompute"] == "True",
            row["precision"],
            row["sharding"],
            float(row["tokens_per_s_per_gpu"]),
        )


@dataclass(frozen=True)
class Prediction:
    """Of one run.

    Attributes:
        step_s: of an optimizer step.
        peak_bytes: of the fullest device, of ``memory_bytes``.
        pieces: logits are made a piece at a time.
    """

    run: Run
    step_s: float
    peak_bytes: float
    memory_bytes: int
    pieces: bool

    @property
    def tokens_per_s(self) -> float:
        run = self.run
        return run.rows_per_gpu * run.grad_accum * run.seq / self.step_s

    @property
    def error(self) -> float:
        return self.tokens_per_s / self.run.tokens_per_s_per_gpu - 1

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory_bytes


def runs_in(folder: Path) -> list[Run]:
    with (folder / "throughput.csv").open() as file:
        return [Run.of(number, row) for number, row in enumerate(csv.DictReader(file), 1)]


def predict(run: Run, whole: bool = False) -> Prediction:
    """By two depths, or as many blocks as the run has."""
    depths = (run.n_layers,) if whole else SHALLOW
    found = _extended([planned(replace(run, n_layers=d), 0) for d in depths], run.n_layers)
    memory = memory_of(run)
    pieces = found[1] > memory
    if pieces:
        made = [planned(replace(run, n_layers=d), CHUNK_ROWS) for d in depths]
        found = _extended(made, run.n_layers)
    return Prediction(run, *found, memory, pieces)


def _extended(made: list[tuple[float, ...]], layers: int) -> tuple[float, ...]:
    """What is known of two depths, at a depth."""
    if len(made) == 1:
        return made[0]
    first, second = made
    further = (layers - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
    return tuple(a + (b - a) * further for a, b in zip(first, second, strict=True))


def _device(run: Run):  # type: ignore[no-untyped-def]
    from pipecompile.compiler.costs.hardware import DEVICES as KNOWN

    return KNOWN[DEVICES[run.gpu]]


def memory_of(run: Run) -> int:
    """Bytes for tensors. FSDP's collectives gather and scatter, and have no buffers for each other
    device."""
    device = _device(run)
    own = device.reserved.parts(links=0, replicas=run.n_gpus, beside=0)
    taken = sum(nbytes for _, nbytes in own)
    return int(device.memory_bytes - taken)


def planned(run: Run, chunk_rows: int) -> tuple[float, float]:
    """(seconds of a step, bytes at the peak)."""
    import torch
    from pipecompile.compiler.capture.batch import flatten
    from pipecompile.compiler.capture.skeleton import skeleton_of
    from pipecompile.compiler.driver.builder import Builder
    from pipecompile.compiler.driver.compiled import Mode
    from pipecompile.compiler.options.options import CompileOptions
    from pipecompile.compiler.planning.target import Target
    from pipecompile.compiler.profiling.calibration import calibrated
    from pipecompile.compiler.tensors.fakes import weightless
    from support.mpt import Mpt

    pure = run.precision == "bf16"
    options = CompileOptions(
        n_stages=1,
        dp=run.n_gpus,
        microbatches=run.grad_accum,
        zero=LEVELS[run.sharding],
        remat="full" if run.recompute else "none",
        precision=None if pure else "bf16_params",
        # one parameter after the other, as the runs' optimizer did: no lists of temporaries
        optimizer=partial(torch.optim.AdamW, lr=1e-4, foreach=False),
        max_grad_norm=1.0,
        chunked_loss=chunk_rows or "off",
        costs="calibrated",
    )
    before = torch.get_default_dtype()
    with weightless():
        torch.set_default_dtype(torch.bfloat16 if pure else torch.float32)
        model = Mpt(run.d_model, run.n_heads, run.n_layers, run.vocab, run.seq)
        torch.set_default_dtype(before)
        ids = torch.zeros(run.rows_per_gpu, run.seq, dtype=torch.long)
        _, spec = flatten({"input_ids": ids, "labels": ids})
        skeleton = skeleton_of(model, torch.device("cpu"), options.dtypes)
    target = Target(torch.device("cpu"), calibrated(_device(run), None))
    plan = Builder(skeleton, options, target).build(Mode.TRAIN, spec, run.grad_accum).plan
    return plan.step_s, float(plan.stages[0].memory.peak)


HEAD = (
    "| # | model | tokens | device | rows | recompute | dtype | published | predicted | error "
    "| peak, GiB | fits |\n"
    "| --: | --- | --: | --- | --- | --- | --- | --: | --: | --: | --: | --- |"
)


def line_of(found: Prediction) -> str:
    run = found.run
    cells = (
        run.number,
        run.model,
        run.seq,
        f"{run.n_gpus} × {DEVICES[run.gpu]}",
        f"{run.rows_per_gpu} × {run.grad_accum}",
        "all" if run.recompute else "–",
        run.precision,
        f"{run.tokens_per_s_per_gpu:,.0f}",
        f"{found.tokens_per_s:,.0f}",
        f"{found.error:+.1%}",
        f"{found.peak_bytes / GIB:.1f} of {found.memory_bytes / GIB:.1f}",
        ("yes" if found.fits else "NO") + (", in pieces" if found.pieces else ""),
    )
    return f"| {' | '.join(map(str, cells))} |"


def summary_of(found: list[Prediction]) -> Iterator[str]:
    """Errors of all, and of each device, length and size."""
    groups = {"all": found}
    for name in ("gpu", "seq", "model"):
        for each in found:
            groups.setdefault(f"{name} {getattr(each.run, name)}", []).append(each)
    yield "| runs | number | median error | 90th percentile | largest | fit |"
    yield "| --- | --: | --: | --: | --: | --: |"
    for name, some in groups.items():
        errors = sorted(abs(each.error) for each in some)
        ninth = quantiles(errors, n=10, method="inclusive")[-1] if len(errors) > 1 else errors[0]
        fit = sum(each.fits for each in some)
        shown = " | ".join(f"{x:.1%}" for x in (median(errors), ninth, errors[-1]))
        yield f"| {name} | {len(some)} | {shown} | {fit} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", help="numbers of rows, from 1", default="")
    parser.add_argument("--whole", action="store_true", help="capture every block")
    parser.add_argument("--json", type=Path, help="write predictions there")
    args = parser.parse_args()
    if not (args.folder / "throughput.csv").is_file():
        print(f"{args.folder} has no throughput.csv: give its folder", file=sys.stderr)
        return 2
    chosen = {int(n) for n in args.rows.split(",") if n}
    runs = [run for run in runs_in(args.folder) if not chosen or run.number in chosen]
    print(HEAD, flush=True)
    found = []
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for each in pool.map(partial(predict, whole=args.whole), runs):
            found.append(each)
            print(line_of(each), flush=True)
    print()
    print("\n".join(summary_of(found)))
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
