"""What our programs bring on a GPU: steps, peaks and kernels' share, beside plain PyTorch.

    python tests/gpu/figures.py [--device cuda] [--seconds 510] [--write docs/gpu.md]
    python tests/gpu/figures.py --device cpu --small

One stage, bf16 (autocast), AdamW, microbatches whose gradients add up. Every contender runs in a
process of its own, so that peaks are its own, and one that fails or takes too long is a word in the
table. What no time is left for is skipped, and said. The tables stand in the file between two
markers, which every run writes anew.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

from support.gpu_models import CONTENDERS, SIZES, SMALL, Size

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
LEAST_S = 20.0  # that a contender gets, or it is not begun
COLUMNS = {
    "step_s": "step",
    "tokens_per_s": "tokens/s",
    "ratio": "to `torch.compile`",
    "kernels": "kernels' share",
    "peak_bytes": "peak",
    "first_s": "first step",
    "predicted_s": "predicted step",
    "predicted_bytes": "predicted peak",
}

Row = dict[str, Any]
"""What a contender found, by column; or its ``error``."""


def in_a_process(size: Size, who: str, device: str, limit_s: float) -> Row:
    """What a contender finds out, if it does so in time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._inductor.compile_fx", "transformers", "pipecompile"])
    mine, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs, size, who, device), daemon=True)
    worker.start()
    theirs.close()
    try:
        found: Row = mine.recv() if mine.poll(limit_s) else {"error": f"not in {limit_s:.0f} s"}
    except EOFError:
        found = {"error": "its process has ended"}
    worker.kill()
    worker.join()
    return found


def _serve(pipe: Any, size: Size, who: str, device: str) -> None:
    try:
        found = importlib.import_module("support.gpu_measured").measured(size, who, device)
    except Exception as error:  # a word in the table, and the rest goes on
        lines = str(error).splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0][:160]}"}
    pipe.send(found)


def all_rows(sizes: Sequence[Size], device: str, deadline: float) -> dict[str, dict[str, Row]]:
    """Model -> contender -> what it found. Those of all models take turns, so that the time that
    there is does not go to the first one."""
    found: dict[str, dict[str, Row]] = {size.name: {} for size in sizes}
    for who in CONTENDERS:
        for size in sizes:
            left = deadline - time.monotonic()
            if left < LEAST_S:
                row: Row = {"error": "skipped: no time left"}
            else:
                row = in_a_process(size, who, device, left)
            found[size.name][who] = row
            print(f"{size.name}, {who}: {json.dumps(row)}", file=sys.stderr, flush=True)
    return found


def table(size: Size, rows: dict[str, Row]) -> list[str]:
    """Markdown of one model."""
    lines = [f"**{size.name}**: {size.described}.", ""]
    lines += ["| | " + " | ".join(COLUMNS.values()) + " |"]
    lines += ["| --- |" + " --: |" * len(COLUMNS)]
    compiled = rows.get("torch.compile", {}).get("step_s")
    for who, row in rows.items():
        if "error" in row:
            lines.append(
                f"| {who} | {row['error'].replace('|', '/')} |" + " |" * (len(COLUMNS) - 1)
            )
            continue
        told = row | {"tokens_per_s": size.tokens / row["step_s"]}
        told |= {"ratio": compiled / row["step_s"]} if compiled else {}
        cells = (_shown(name, told.get(name)) for name in COLUMNS)
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return [*lines, ""]


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "first_s":
        return f"{value:.0f} s"
    if name.endswith("_s") and name != "tokens_per_s":
        return f"{value * 1e3:.1f} ms"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**27 else f"{value / 2**20:.1f} MiB"
    if name == "kernels":
        return f"{value:.0%}"
    return f"{value:,.0f}" if name == "tokens_per_s" else f"{value:.2f}×"


def written(text: str, tables: str) -> str:
    """The document with other tables between its markers.

    Raises:
        SystemExit: it has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"the file has no {BEGIN} … {END}, between which the tables are written")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def header(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine() or "cpu"
    today = datetime.date.today().isoformat()
    return f"{name}, torch {torch.__version__}, {today}; medians."


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--seconds", type=float, default=510.0, help="that all of it may take")
    parser.add_argument("--write", type=Path, help="the file with the markers; None only prints")
    told = parser.parse_args(given)
    deadline = time.monotonic() + told.seconds
    import torch

    if told.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch sees no CUDA device: --device cpu --small tries the script itself")
    with tempfile.TemporaryDirectory() as cache:  # first steps are first ones, prices are measured
        os.environ |= {"PIPECOMPILE_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        sizes = SMALL if told.small else SIZES
        found = all_rows(sizes, told.device, deadline)
    parts = [line for size in sizes for line in table(size, found[size.name])]
    tables = "\n".join([header(told.device), "", *parts])
    print(tables)
    if told.write is not None:
        told.write.write_text(written(told.write.read_text(), tables))


if __name__ == "__main__":
    main()
