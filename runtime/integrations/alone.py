"""What a Trainer is told of the world: that it is alone, on one device.

All ranks run the same Trainer over the same steps, and the pipeline is its device: what is divided
over processes is divided inside of it. Left to itself, accelerate would take each process for a
replica, deal data out among all of them, and gather what all have already.

Accelerate has no way to be told this, so its states (dicts that all objects of a class share) are
changed in place. They are made anew with each `TrainingArguments`, hence `alone` before each run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader


def alone(args: Any, rank: int) -> None:
    """From here on accelerate knows of one process alone; rank 0 stays the one that writes.

    Without a GPU, and without ``use_cpu=True``, accelerate has not seen the other processes, and
    would let each of them write.
    """
    args._n_gpu = min(1, args.n_gpu)  # else a Trainer puts a DataParallel around the model
    for state in (PartialState, AcceleratorState):
        shared = state._shared_state
        if shared:
            shared |= {"num_processes": 1, "distributed_type": DistributedType.NO}
            local = int(os.environ.get("LOCAL_RANK", rank))
            shared |= {"process_index": rank, "local_process_index": local}


class Skipped:
    """Tells a Trainer that the optimizer's last step was skipped; it looks at
    ``accelerator._optimizers``, where this stands for the pipeline's."""

    step_was_skipped = False


def hand_over(
    accelerator: Any,
    load: Callable[[DataLoader[Any]], DataLoader[Any]],
    clip: Callable[[float], Any],
    keep: Callable[[Any], Any],
) -> None:
    """Put the pipeline behind an accelerator's methods.

    Args:
        load: makes the loader that is prepared.
        clip: clips all gradients; returns their norm.
        keep: what of outputs of a batch belongs to its rows.
    """
    prepare = accelerator.prepare

    def prepared(*objects: Any, **options: Any) -> Any:
        made = [prepare(load(o), **options) if isinstance(o, DataLoader) else o for o in objects]
        return made[0] if len(made) == 1 else tuple(made)

    def clipped(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        return clip(max_norm)

    def gathered(data: Any, use_gather_object: bool = False) -> Any:
        return keep(data)

    accelerator.dataloader_config.dispatch_batches = False  # nobody to deal out to
    accelerator.prepare = prepared
    accelerator.clip_grad_norm_ = clipped
    accelerator.gather_for_metrics = gathered
