"""Values of options: two that ranks must not mix, texts of flags and what they mean."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

SGD = partial(torch.optim.SGD, lr=0.1)

FLAGS: dict[str, tuple[str, Any]] = {
    "n_stages": ("--stages 3", 3),
    "dp": ("--dp 2", 2),
    "devices": ("--devices 6", 6),
    "microbatches": ("--microbatches 5", 5),
    "schedule": ("--schedule zb_h1", "zb_h1"),
    "tied_grads": ("--tied-grads per_step", "per_step"),
    "memory": ("--memory 20GiB", "20GiB"),
    "remat": ("--remat full", "full"),
    "precision": ("--precision bf16", "bf16"),
    "zero": ("--zero 2", 2),
    "pin": ("--pin lm_head=1 --pin transformer.h.0=0", {"lm_head": 1, "transformer.h.0": 0}),
    "hardware": ("--device h100", "h100"),
    "solver": ("--solver cbc", "cbc"),
    "time_limit_s": ("--time-limit 2.5", 2.5),
    "plan": ("--plan plan.json", "plan.json"),
    "dump_dir": ("--dump made", "made"),
    "skip": ("--skip inplace,remat", ("inplace", "remat")),
}
"""Option -> its flag with another value than the default, and that value."""
