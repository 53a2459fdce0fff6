"""What checksums cost: a checkpoint saved and loaded with them and without, in turns.

    python tests/bench/checkpoint_table.py [--gib 1.0] [--rounds 5] [--folder DIR]

One process, AdamW: a third of the bytes is parameters. Every save ends with an fsync, so the disk
counts; `--folder /dev/shm` shows the cost beside memory alone, where it is largest. Prints seconds
and the ratio of medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pipecompile
import torch
from pipecompile.runtime.files import checksums, tensor_file
from torch import nn

WIDTH = 2048


class Layers(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    layers = max(1, round(given.gib * 2**30 / (3 * 4 * WIDTH**2)))
    example = torch.ones(1, WIDTH)
    pipe = pipecompile.compile(
        Layers(layers), 1, microbatches=1, optimizer=torch.optim.AdamW, example_batch=example
    )
    pipe.step(example)
    folder = Path(tempfile.mkdtemp(dir=given.folder, prefix="checkpoint-table-"))
    write = tensor_file.write
    found: dict[str, list[float]] = {
        name: [] for name in ("save", "bare save", "load", "bare load")
    }
    try:
        for number in range(given.rounds + 1):  # the first fills caches
            times = {}
            for kind in ("bare ", "") if number % 2 else ("", "bare "):  # none is always first
                bare = partial(write, sum_of=lambda data: "0" * 16)
                tensor_file.write = bare if kind else write
                os.sync()  # what is left of the last one
                times[f"{kind}save"] = seconds(lambda k=kind: pipe.save(folder / f"to{k}"))
            for kind in ("bare ", "") if number % 2 else ("", "bare "):
                verify = not kind
                load = partial(pipe.load, folder / "to", verify=verify)
                times[f"{kind}load"] = seconds(load)
            for name, value in times.items():
                found[name] += [value] if number else []
        size = sum(path.stat().st_size for path in (folder / "to").rglob("part-*"))
    finally:
        shutil.rmtree(folder)
    data = torch.ones(1 << 26)
    rate = data.nbytes / min(seconds(lambda: checksums.of_tensor(data)) for _ in range(3))
    print(f"{size / 2**30:.2f} GiB; checksums alone read {rate / 1e9:.1f} GB/s")
    for name in ("save", "load"):
        mine, bare = statistics.median(found[name]), statistics.median(found[f"bare {name}"])
        print(f"{name}: {mine:.2f} s, without checksums {bare:.2f} s: {mine / bare:.2f} times")


if __name__ == "__main__":
    main()
