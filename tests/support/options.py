"""Values of options: two that ranks must not mix, texts of flags and what they mean."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from pipecompile import Precision
from safetensors.torch import save_file

from support.plans import hand_made

SGD = partial(torch.optim.SGD, lr=0.1)

FLAGS: dict[str, tuple[str, Any]] = {
    "n_stages": ("--stages 3", 3),
    "dp": ("--dp 2", 2),
    "training": ("--training false", False),
    "devices": ("--devices 6", 6),
    "microbatches": ("--microbatches 5", 5),
    "schedule": ("--schedule zb_h1", "zb_h1"),
    "schedule_memory": ("--schedule-memory 2x1f1b", "2x1f1b"),
    "virtual_stages": ("--virtual-stages 3", 3),
    "tied_grads": ("--tied-grads per_step", "per_step"),
    "costs": ("--costs calibrated", "calibrated"),
    "loss_normalization": ("--loss-normalization microbatch", "microbatch"),
    "memory": ("--memory 20GiB", "20GiB"),
    "remat": ("--remat full", "full"),
    "chunked_loss": ("--chunked-loss 512", 512),
    "precision": ("--precision bf16", "bf16"),
    "backend": ("--backend inductor", "inductor"),
    "zero": ("--zero 2", 2),
    "compress": ("--compress gradients=int8,values=bf16", "gradients=int8,values=bf16"),
    "sparse_embeddings": ("--sparse-embeddings exchange", "exchange"),
    "zero_by": ("--zero-by matrices", "matrices"),
    "zero_keep": ("--zero-keep nothing", "nothing"),
    "placement": ("--placement replicas", "replicas"),
    "pin": ("--pin lm_head=1 --pin transformer.h.0=0", {"lm_head": 1, "transformer.h.0": 0}),
    "eager_modules": ("--eager-modules h.*,last", ("h.*", "last")),
    "hardware": ("--device h100", "h100"),
    "solver": ("--solver cbc", "cbc"),
    "time_limit_s": ("--time-limit 2.5", 2.5),
    "plan": ("--plan plan.json", "plan.json"),
    "dump_dir": ("--dump made", "made"),
    "skip": ("--skip inplace,remat", ("inplace", "remat")),
}
"""Option -> its flag with another value than the default, and that value."""


def differing(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Option -> the options of rank 0 and of rank 1, of two, which differ in nothing else.

    Args:
        folder: where the files lie that they name; the same on both ranks.
    """
    weights = folder / "weights.safetensors"
    if not weights.exists():
        save_file({"weight": torch.zeros(1)}, weights)
    two, replicas = {"n_stages": 2}, {"n_stages": 1, "dp": 2}
    pairs = {
        "n_stages": (two, replicas),
        "dp": ({"n_stages": 1, "dp": 2}, {"n_stages": 1, "dp": 1}),
        "training": ({}, {"training": False}),
        "optimizer": ({"optimizer": SGD}, {}),
        "microbatches": ({"microbatches": 2}, {}),
        "cut": ({"cut": max}, {}),
        "loss_normalization": ({}, {"loss_normalization": "microbatch"}),
        "dynamic": ({}, {"dynamic": "off"}),
        "loss_weight": ({"loss_weight": len}, {}),
        "max_grad_norm": ({"max_grad_norm": 1.0}, {"max_grad_norm": 2.0}),
        "lr_scheduler": ({"lr_scheduler": SGD}, {}),
        "example_batch": ({"example_batch": torch.ones(4, 8)}, {}),
        "verify": ({"optimizer": SGD, "verify": 1}, {"optimizer": SGD, "verify": 2}),
        "weights": ({}, {"weights": weights}),
        "schedule": ({}, {"schedule": "zb_h1"}),
        "schedule_memory": (
            {"schedule": "zb", "schedule_memory": "1f1b"},
            {"schedule": "zb", "schedule_memory": "2x1f1b"},
        ),
        "virtual_stages": (
            {"schedule": "interleaved", "virtual_stages": 2},
            {"schedule": "interleaved", "virtual_stages": 3},
        ),
        "tied_grads": ({}, {"tied_grads": "per_step"}),
        "memory": ({"memory": "1GiB"}, {"memory": "2GiB"}),
        "remat": ({"remat": "none"}, {"remat": "full"}),
        "precision": ({"precision": "bf16"}, {"precision": Precision(compute=torch.float16)}),
        "backend": ({}, {"backend": "inductor"}),
        "cudagraphs": ({}, {"cudagraphs": "auto"}),
        "chunked_loss": ({"chunked_loss": "auto"}, {"chunked_loss": 512}),
        "zero": ({"zero": 1}, {"zero": "auto"}),
        "timeout_s": ({"timeout_s": 60.0}, {"timeout_s": 90.0}),
        "zero_by": ({"zero_by": "rows"}, {"zero_by": "matrices"}),
        "zero_keep": ({"zero_keep": "nothing"}, {"zero_keep": "gradients"}),
        "placement": ({}, {"placement": "replicas"}),
        "compress": ({"compress": "int8"}, {"compress": "powersgd:2"}),
        "sparse_embeddings": (
            {"sparse_embeddings": "exchange", "optimizer": SGD},
            {"sparse_embeddings": "step", "optimizer": SGD},
        ),
        "pin": ({"pin": {"first": 0}}, {"pin": {"first": 1}}),
        "eager_modules": ({}, {"eager_modules": ["first"]}),
        "costs": ({"costs": "roofline"}, {"costs": "calibrated"}),
        "plan": ({}, {"plan": hand_made()[0]}),
        "skip": ({}, {"skip": ["inplace"]}),
    }
    beside = {"max_grad_norm": {"optimizer": SGD}, "lr_scheduler": {"optimizer": SGD}}
    divided = replicas | {"zero": 1}
    kept = replicas | {"zero": 3}
    shapes = {
        "zero": replicas,
        "zero_keep": kept,
        "compress": replicas,
        "sparse_embeddings": replicas,
        "zero_by": divided,
        "n_stages": {},
        "dp": {},
    }
    return {
        name: tuple(shapes.get(name, two) | beside.get(name, {}) | each for each in pair)  # type: ignore[misc]
        for name, pair in pairs.items()
    }
