"""What ZeRO saves: bytes that each rank holds, measured and by the formula; `make zero-table`.

Real processes over gloo train a small Llama. Weights, gradients and optimizer states are counted
storage by storage after a step, the peak by a dispatch mode during one. With W elements, in fp32
AdamW and dp replicas the formulas are

level   weights          gradients   states
0       4 W              4 W         8 W
1       4 W              4 W         8 W / dp
2       4 W              4 W / dp    8 W / dp
3       4 W / dp         4 W / dp    8 W / dp

and in bf16 the weights are 4 W / dp from level 1 on where only their bf16 copy (2 W, none at
level 3) is computed with. "formula" is the share by element; the plan's prediction counts rows,
padding and step counters as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

KINDS = ("weights", "copies", "grads", "states", "peak")
SIZES: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}


def measure(dp: int, zero: int, precision: str | None) -> dict[str, int]:
    """Train as this process's rank."""
    from support import measured, models

    models.MODELS["wide"] = (lambda: models.llama(**SIZES), models.tokens)
    return measured.shares("wide", 1, dp, 2, 32, zero=zero, precision=precision)


def formula(kind: str, zero: int, dp: int, precision: str | None, found: Any) -> float:
    """The share of what is held at level 0."""
    whole = found[kind]
    if kind == "states":
        return whole / dp if zero >= 1 else whole
    if kind == "grads":
        return whole / dp if zero >= 2 else whole
    if kind == "copies":
        return 0 if zero == 3 else whole
    if zero == 3:
        return whole / dp
    if zero and precision:  # what has a copy is divided, what has none is read itself
        copied = 2 * found["copies"]
        return whole - copied + copied / dp
    return whole


def main() -> None:
    from bench.zero_table import measure as share  # by a name that its processes can import
    from support.gang import Gang

    print(
        "| dp | precision | zero | "
        + " | ".join(f"{kind}, MiB (formula)" for kind in KINDS[:-1])
        + " | peak, MiB (plan) |\n|--:|---|--:|"
        + "--:|" * len(KINDS)
    )
    worst: dict[str, float] = dict.fromkeys((*KINDS, "formula"), 0.0)
    for dp in (2, 4):
        gang = Gang(dp)
        for precision in (None, "bf16", "bf16_params"):
            whole: dict[str, int] = {}
            for zero in range(4):
                ranks = gang.run(share, dp, zero, precision)
                largest = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
                whole = whole or largest
                cells = []
                for kind in KINDS:
                    held, predicted = largest[kind], largest[f"predicted {kind}"]
                    worst[kind] = max(worst[kind], abs(predicted / held - 1) if held else 0.0)
                    wanted = predicted
                    if kind != "peak":
                        wanted = formula(kind, zero, dp, precision, whole)
                        off = abs(wanted / held - 1) if held else 0.0
                        worst["formula"] = max(worst["formula"], off)
                    cells.append(f"{held / 2**20:.2f} ({wanted / 2**20:.2f})")
                name = precision or "fp32"
                print(f"| {dp} | {name} | {zero} | {' | '.join(cells)} |", flush=True)
        gang.close()
    errors = ", ".join(f"{kind} {error:.2%}" for kind, error in worst.items())
    print(f"\nlargest errors of the plan's predictions, and of the formula: {errors}")


if __name__ == "__main__":
    main()
