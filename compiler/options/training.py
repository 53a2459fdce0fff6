"""The options of what is trained, and on what."""
# ruff: noqa: RUF009 -- `option` returns a field

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks
from .declaration import PIPELINE, Flag, as_it_is, option, whether_given
from .parsing import parse_count, parse_truth
from .weight_path import locate_weights

if TYPE_CHECKING:
    import torch

    from ..capture.calling import LossFn


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Those of the training itself: what a script on one device has too."""

    microbatches: int | None = option(
        None,
        help="into how many a replica's batch is cut",
        more="They differ by at most a row. None takes the divisor of its rows nearest to "
        "4 × n_stages (1 for one stage); 4 × n_stages with ``cut``.",
        check=checks.check_count,
        flag=Flag(
            group=PIPELINE,
            metavar="M",
            parse=parse_count,
            default="the divisor of its rows nearest to 4 per stage",
        ),
        compared=as_it_is,
    )
    cut: Callable[[Any, int], Sequence[Any]] | None = option(
        None,
        help="(batch, pieces) -> a list of so many batches, or None for some, which together have "
        "all of it",
        more="For batches that are not cut along dim 0, such as flattened ones, many documents in "
        "one row: `pipecompile.data.cut_documents`. It cuts a batch over replicas, where one "
        "process plays them, and each of these into microbatches, which may have any sizes.",
        check=checks.callable_or("give a function of (batch, pieces), such as data.cut_documents"),
        compared=whether_given,
    )
    training: bool = option(
        True,
        help="whether it trains; False for inference alone: no gradients, no optimizer, stages for "
        "the forward, and weights in the dtype that they are computed in",
        more="``forward``, ``predict`` and ``evaluate`` give the bits of the pipeline that trains. "
        "Options of training are then refused.",
        check=checks.check_truth,
        plan="keeps",
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="BOOL", parse=parse_truth),
    )
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = option(
        None,
        help="called with the named parameters of this process",
        more="A factory such as ``functools.partial(torch.optim.AdamW, lr=3e-4)``, or a function "
        "that makes parameter groups of them.",
        check=checks.check_optimizer,
        compared=whether_given,
    )
    loss_fn: LossFn | None = option(
        None,
        help="(output, batch) -> scalar",
        more='None takes ``output.loss``, ``output["loss"]`` or a scalar output. The parameters of '
        "an ``nn.Module`` are trained too.",
        check=checks.callable_or("give a function of (output, batch)"),
    )  # ranks compare the graph that it is part of
    loss_normalization: str = option(
        "auto",
        help='what microbatches count in the loss and its gradients: "batch": what makes it the '
        'loss of the whole batch on one device, whatever microbatches and replicas; "microbatch": '
        'all as much; "auto": "batch" where the graph tells how, else a warning',
        more="Means over the labels that are kept, over rows, and sums are told apart, and several "
        "terms weighed each by its own.",
        choices=("auto", "batch", "microbatch"),
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="HOW"),
    )
    dynamic: str | Mapping[str, Mapping[int, tuple[int, int]]] = option(
        "auto",
        help='batches of other sizes: "auto": once sizes vary, the model is traced with symbols '
        'for them, and further sizes need no tracing; "off": each shape is traced, and each value '
        "of a number",
        more='Ranges of sizes, ``{"input_ids": {1: (8, 2048)}}``, are "auto" too: the largest is '
        "compiled at once, to see that it fits into memory, and others are refused. Programs are "
        "the same in all ways. Where forward does something else with other sizes, each shape is "
        "traced.",
        check=checks.check_dynamic,
        compared=as_it_is,
    )
    loss_weight: Callable[[Any], float | torch.Tensor] | None = option(
        None,
        help="(microbatch) -> what it counts, for a loss that is a mean over something else",
        more="It gets the microbatch as the model does, and may return the number of tokens that "
        "the loss is a mean over. The loss of the batch is the mean weighed by it.",
        check=checks.callable_or("give a function of a microbatch that returns a number"),
        compared=whether_given,
    )
    max_grad_norm: float | None = option(
        None,
        help="`step` clips the global gradient norm to it",
        check=checks.check_above_zero,
        compared=as_it_is,
    )
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = option(
        None,
        help="called with the optimizer; `step` steps what it returns",
        more="One whose ``step`` needs a metric is yours to step: ``pipe.lr_scheduler``.",
        check=checks.check_scheduler,
        compared=whether_given,
    )
    callbacks: Collection[Any] = option(
        (),
        help="what rank 0 tells of steps, evaluations and saves: objects of "
        "`pipecompile.callbacks`, or with methods such as theirs",
        more="``pipe.callbacks`` is the list of them, to which more can be added.",
        check=checks.check_callbacks,
    )  # no part of a plan, and rank 0 alone calls them
    example_batch: Any = option(
        None,
        help="compile now, for batches of this shape",
        more="What `step` will be given, under torchrun this process's share. None waits for the "
        "first batch or `compile_for`.",
        compared=whether_given,
    )
    device: str | torch.device | None = option(
        None, help='"cpu" or "cuda"', more="None takes CUDA if there is one."
    )
    seed: int | None = option(
        None,
        help="of dropout and other random ops, and of weights that are initialised here",
        more="None takes torch's initial seed. All ranks take that of rank 0.",
        check=checks.check_int,
    )
    verify: int = option(
        0,
        help="so many first steps are compared with a copy of the model in one process",
        more="Losses, gradients, norms, parameters and buffers, then evaluation and outputs; what "
        "differs is an error that names it. It takes another forward and backward per step, on "
        "rank 0, and memory for the copy. Then ``pipe.verification`` says what was compared.",
        check=checks.check_natural,
        compared=as_it_is,
    )
    weights: str | Path | None = option(
        None,
        help="a ``.safetensors`` file, or a folder with one, or with several and "
        "``model.safetensors.index.json``",
        more="Each rank reads what its own stages need, cast to the model's dtype. The model's own "
        "weights are then ignored.",
        check=lambda _, path: locate_weights(path),
        compared=whether_given,
    )
