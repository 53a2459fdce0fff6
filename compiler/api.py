"""`pipecompile.compile`: the one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .ir.errors import OptionError
from .options.options import parse_options

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline
    from .costs.hardware import Device
    from .ir.precision import Precision
    from .plan.plan import Plan

AUTO = "auto"


def compile(
    model: nn.Module,
    n_stages: int | str,
    dp: int | None = None,
    *,
    devices: int | None = None,
    microbatches: int | None = None,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    max_grad_norm: float | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    example_batch: Any = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    weights: str | Path | None = None,
    schedule: str = "1f1b",
    tied_grads: str = "per_microbatch",
    memory: int | str | None = None,
    remat: str = "auto",
    precision: str | Precision | None = None,
    zero: int | str = 0,
    pin: Mapping[str, int] | None = None,
    plan: str | Path | Plan | None = None,
    costs: str = "auto",
    hardware: str | Path | Device | None = None,
    solver: str = "auto",
    time_limit_s: float = 30.0,
    dump_dir: str | Path | None = None,
    **unknown: Any,
) -> Pipeline:
    """Compile an unmodified model into a pipeline-parallel training program.

    Started by torchrun with n_stages × dp processes, each plays one rank; started by plain
    python, the one process plays them all, with the same numbers bit for bit. The model's
    weights are copied; the model itself stays as it is and may be deleted.

    Args:
        model: any module that `torch.export` can trace; it trains in the mode that it is in.
            Built under ``torch.device("meta")`` it has no weights: each rank then makes those of
            its own stages, by the model's initialisers (``reset_parameters``, ``_init_weights``)
            or from ``weights``.
        n_stages: pipeline stages, or "auto": every division of the devices between stages and
            replicas is planned for ``example_batch``, which is then the batch of all replicas,
            and the one with the shortest predicted step is taken.
        dp: data-parallel replicas of the pipeline; None for 1, or with "auto" for what is best.
        devices: how many there are, for "auto"; None takes the number of processes, or of GPUs.
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
        seed: of dropout and other random ops, and of weights that are initialised here; None
            takes torch's initial seed (of rank 0).
        weights: a ``.safetensors`` file, or a folder with one, or with several and
            ``model.safetensors.index.json``: each rank reads what its own stages need, cast to
            the model's dtype. The model's own weights are then ignored.
        schedule: "1f1b", or "zb_h1", which computes weight gradients a little later than the
            gradients that other stages wait for: a smaller bubble for some more memory on the
            later stages. Both give the same bits.
        tied_grads: how a weight that several stages read gets its gradient. "per_microbatch"
            sends its parts with every microbatch and adds them in autograd's order, which makes
            the gradient that of one device bit for bit; "per_step" adds up the parts once per
            step, which sends less and may differ in the last bits.
        memory: what a rank may use at its peak, bytes or a text such as "20GiB"; None takes the
            device's own, shared among the ranks on it.
        remat: "auto" recomputes in the backward what it takes to fit into ``memory``, chosen
            together with the stages; "none" nothing; "full" keeps each unit's inputs only.
        precision: "bf16" or "fp16" computes matrix products, convolutions and attention in that
            dtype, as `torch.autocast` does on the device; weights, gradients and optimizer
            states stay in fp32, also those of a model that comes in a reduced dtype. "fp16" comes
            with dynamic loss scaling. "fp32" computes everything in fp32. None leaves the model's
            dtypes as they are. A `pipecompile.Precision` says more.
        zero: what the replicas of a stage divide among themselves, by rows of each parameter,
            instead of holding all of it: 1 the optimizer's states, and fp32 weights of which only
            a copy in another dtype is computed with; 2 the gradients too; 3 the parameters too,
            which are fetched layer by layer while the layer before computes. "auto" takes the
            smallest that fits into ``memory``. From 1 on the optimizer holds this rank's rows, so
            it must treat every element alone, as SGD and Adam do.
        pin: dotted name of a module or parameter -> the stage that its operators go to.
        plan: a `Plan`, or the path of one that ``pipe.plan.save`` or ``inspect --json`` wrote: its
            stages and recomputation are used as they are.
        costs: where the planner's seconds come from: "profile" measures each distinct unit on the
            device at hand (remembered on disk), "roofline" takes peak rates; "auto" measures.
        hardware: plan for another device: a name ("h100", "h200", "a100", "l4", "cpu"), a
            `Device`, or the path of a JSON file that describes one. Implies peak rates.
        solver: of the partitioning problem: "auto", "highs", "cbc" or "dynamic".
        time_limit_s: seconds after which the solver's best so far is taken.
        dump_dir: write what every pass made, as text, below this folder.

    Raises:
        OptionError: an unknown, impossible or ineffective option.
        WorldSizeError: torchrun started another number of processes than n_stages × dp.
        MemoryBudgetError: no division fits into ``memory``.
        PlanError: ``plan`` is damaged, or was made for something else.
        StateError: ``weights`` does not fit the model, or there is no initialiser.
        SharedStorageError, CaptureError, LossError, BatchError, PartitionError: from compiling,
            at the first batch or with ``example_batch``.
    """
    options = parse_options(
        dict(
            n_stages=1 if n_stages == AUTO else n_stages,
            dp=1 if dp is None else dp,
            microbatches=microbatches,
            optimizer=optimizer,
            loss_fn=loss_fn,
            max_grad_norm=max_grad_norm,
            lr_scheduler=lr_scheduler,
            example_batch=example_batch,
            device=device,
            seed=seed,
            weights=weights,
            schedule=schedule,
            tied_grads=tied_grads,
            memory=memory,
            remat=remat,
            precision=precision,
            zero=zero,
            pin=pin,
            plan=plan,
            costs=costs,
            hardware=hardware,
            solver=solver,
            time_limit_s=time_limit_s,
            dump_dir=dump_dir,
            **unknown,
        )
    )
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    from ..runtime.start import start, start_best

    if n_stages != AUTO:
        if devices is not None:
            raise OptionError('devices= has no effect without n_stages="auto"')
        return start(model, options)
    if dp is not None:
        raise OptionError(
            f'dp={dp} beside n_stages="auto": dp follows from the devices, leave it out'
        )
    if options.example_batch is None:
        raise OptionError(
            'n_stages="auto" needs example_batch=, the batch of all replicas, to plan for'
        )
    for name in ("plan", "pin"):
        if getattr(options, name) is not None:
            raise OptionError(f'{name}= names stages: give n_stages a number, not "auto"')
    return start_best(model, options, devices)
