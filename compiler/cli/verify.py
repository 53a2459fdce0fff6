"""`pipecompile verify`: a model of one's own, trained beside one process for some steps."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..report.quiet import quiet
from .flags import add_command, count

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from .flags import Parser

_EXAMPLES = """\

examples
  pipecompile verify train.py:build --stages 4 --dp 2 --microbatches 2
  pipecompile verify hf:llama --stages 2 --seq 64 --set num_hidden_layers=4 --set hidden_size=256
  torchrun --nproc-per-node 4 --no-python pipecompile verify train.py:build --stages 2 --dp 2
"""


def add_to(commands: _SubParsersAction[Parser]) -> None:
    parser, _ = add_command(
        commands,
        "verify",
        _run,
        ("adamw", "sgd"),
        help="train some steps beside the model in one process, and compare all of it",
        description="Train some steps of the pipeline beside a copy of the model in eager PyTorch, "
        "in one process: losses, gradients, norms, parameters, buffers, evaluation and outputs. "
        "The same microbatches, and the same dropout. Exit status 1 if anything differs.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--steps", type=count, default=2, metavar="N", help="how many are compared (default: 2)"
    )
    parser.add_argument(
        "--clip",
        type=float,
        default=1.0,
        metavar="NORM",
        help="the norm that gradients are clipped to (default: 1)",
    )


def _run(args: argparse.Namespace) -> int:
    from ..ir.errors import VerifyError

    try:
        said = _verified(args)
    except VerifyError as error:
        print(f"pipecompile: {error}", file=sys.stderr)
        return 1
    if said:
        print(said)
    return 0


def _verified(args: argparse.Namespace) -> str:
    """What was compared; "" on ranks that compare nothing."""
    with quiet():
        import torch

        from ...runtime.start import start, start_best
        from ..capture import batch as batches
        from ..options.microbatches import cut
        from ..subjects.spec import load
        from .request import asked, open_of

    options, wanted, _ = asked(args)
    subject = load(args.spec, wanted, real=True)
    factories = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    chosen = replace(
        options,
        optimizer=partial(factories[args.optimizer or "adamw"], lr=1e-3),
        loss_fn=subject.loss_fn,
        max_grad_norm=args.clip,
        verify=args.steps,
    )
    open_ = open_of(args)
    if open_ is not None:
        planned = replace(chosen, example_batch=subject.batch)
        pipe = start_best(subject.model, planned, open_)
    else:
        pipe = start(subject.model, chosen)
    values, spec = batches.flatten(subject.batch)
    share = batches.cut(values, cut(spec.rows, pipe.data_shards))[pipe.data_shard]
    for _ in range(args.steps):
        pipe.step(spec.build(share))
    return pipe.verification
