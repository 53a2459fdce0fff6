"""`pipecompile.compile`: the one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import OptionError
from .options import parse_options
from .skeleton import skeleton_of

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline


def compile(
    model: nn.Module,
    n_stages: int,
    dp: int = 1,
    *,
    microbatches: int | None = None,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    max_grad_norm: float | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    example_batch: Any = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    schedule: str = "1f1b",
    tied_grads: str = "per_microbatch",
    dump_dir: str | Path | None = None,
    **unknown: Any,
) -> Pipeline:
    """Compile an unmodified model into a pipeline-parallel training program.

    Started by torchrun with n_stages × dp processes, each plays one rank; started by plain
    python, the one process plays them all, with the same numbers bit for bit. The model's
    weights are copied; the model itself stays as it is and may be deleted.

    Args:
        model: any module that `torch.export` can trace; it trains in the mode that it is in.
        n_stages: pipeline stages.
        dp: data-parallel replicas of the pipeline.
        microbatches: into how many a replica's batch is cut; None takes the divisor of its rows
            nearest to 4 × n_stages (1 for one stage).
        optimizer: called with the named parameters of this process: a factory such as
            ``functools.partial(torch.optim.AdamW, lr=3e-4)``, or a function that makes parameter
            groups of them.
        loss_fn: (output, batch) -> scalar; None takes ``output.loss``, ``output["loss"]`` or a
            scalar output.
        max_grad_norm: `step` clips the global gradient norm to it.
        lr_scheduler: called with the optimizer; `step` steps what it returns.
        example_batch: compile now, for batches of this shape: what `step` will be given, under
            torchrun this process's share. None waits for the first batch or `compile_for`.
        device: "cpu" or "cuda"; None takes CUDA if there is one.
        seed: of dropout and other random ops; None takes torch's initial seed (of rank 0).
        schedule: "1f1b", or "zb_h1", which computes weight gradients a little later than the
            gradients that other stages wait for: a smaller bubble for some more memory on the
            later stages. Both give the same bits.
        tied_grads: how a weight that several stages read gets its gradient. "per_microbatch"
            sends its parts with every microbatch and adds them in autograd's order, which makes
            the gradient that of one device bit for bit; "per_step" adds up the parts once per
            step, which sends less and may differ in the last bits.
        dump_dir: write what every pass made, as text, below this folder.

    Raises:
        OptionError: an unknown, impossible or ineffective option.
        WorldSizeError: torchrun started another number of processes than n_stages × dp.
        SharedStorageError, CaptureError, LossError, BatchError, PartitionError: from compiling,
            at the first batch or with ``example_batch``.
    """
    options = parse_options(
        dict(
            n_stages=n_stages,
            dp=dp,
            microbatches=microbatches,
            optimizer=optimizer,
            loss_fn=loss_fn,
            max_grad_norm=max_grad_norm,
            lr_scheduler=lr_scheduler,
            example_batch=example_batch,
            device=device,
            seed=seed,
            schedule=schedule,
            tied_grads=tied_grads,
            dump_dir=dump_dir,
            **unknown,
        )
    )
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    from ..runtime.mesh import choose_device, make_mesh
    from ..runtime.pipeline import Pipeline

    mesh = make_mesh(options.n_stages, options.dp)
    where = choose_device(options.device, mesh)
    return Pipeline(model, options, skeleton_of(model, where), mesh, where)
