"""What of `TrainingArguments` a pipeline honours, and as what; the rest is an error."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...compiler.ir.errors import OptionError

_DONE = {
    "optimizer": "`optim` and its arguments make it, or optimizer_cls_and_kwargs=",
    "lr_scheduler": "`lr_scheduler_type` makes it",
    "max_grad_norm": "give `max_grad_norm` of TrainingArguments",
    "loss_fn": "give compute_loss_func=",
    "loss_weight": "the Trainer's way of counting holds",
    "loss_normalization": "the Trainer's way of counting holds",
    "cut": "`gradient_accumulation_steps` says how batches are cut",
    "example_batch": "the train_dataset has one",
    "device": "`use_cpu` says which",
    "weights": "the model brings them",
}
"""Options of `compile` that the Trainer gives."""

_REFUSED = {
    "fsdp": 'give zero=1, 2 or 3 in pipeline=, and `dp`, for what it divides: leave "fsdp" out',
    "deepspeed": "give zero=1, 2 or 3 in pipeline=, and leave it out",
    "parallelism_config": "pipeline= says what is divided",
    "auto_find_batch_size": "give memory= in pipeline=, for which the plan is made before it runs",
    "use_liger_kernel": 'give chunked_loss="auto" in pipeline= for what it saves in memory',
    "push_to_hub": "call save_model(), and upload the folder",
    "batch_eval_metrics": "let compute_metrics have all predictions, smaller by "
    "preprocess_logits_for_metrics",
    "enable_jit_checkpoint": "use pipecompile.Preemption in a callback that sets "
    "control.should_save",
    "neftune_noise_alpha": "its noise is drawn by a hook of the model that was passed, and the "
    "pipeline has a copy",
    "bf16_full_eval": "the pipeline evaluates in the precision that it trains in: `bf16`",
    "fp16_full_eval": "the pipeline evaluates in the precision that it trains in: `fp16`",
    "optim_target_modules": "only optimizers of torch.optim's kind are taken",
    "torch_compile_mode": "the pipeline's Inductor has no modes",
    "ddp_find_unused_parameters": "there is no DistributedDataParallel",
    "ddp_bucket_cap_mb": "there is no DistributedDataParallel",
    "ddp_broadcast_buffers": "there is no DistributedDataParallel",
    "ddp_static_graph": "there is no DistributedDataParallel",
    "torch_empty_cache_steps": "the pipeline's memory is planned: give memory= in pipeline=",
    "debug": "it looks into the model that was passed, and the pipeline has a copy",
}


@dataclass(frozen=True)
class Settings:
    """Attributes:
    options: of `pipecompile.compile`, without optimizer and loss.
    args: what the Trainer is to see.
    accumulation: batches of a replica in one step.
    """

    options: Mapping[str, Any]
    args: Any
    accumulation: int
    n_stages: int
    dp: int


def settings_of(args: Any, pipeline: Mapping[str, Any]) -> Settings:
    """Those of a run.

    Args:
        args: `TrainingArguments`.
        pipeline: options of `pipecompile.compile`.

    Raises:
        OptionError: one of either cannot be honoured, or stands against another.
    """
    options = dict(pipeline)
    for name, instead in _DONE.items():
        if options.get(name) is not None:
            raise OptionError(f"pipeline={{{name!r}: ...}} beside PipelineTrainer: {instead}")
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            raise OptionError(f"PipelineTrainer cannot honour TrainingArguments({name}=): {why}")
    _check(args, options)
    accumulation = args.gradient_accumulation_steps
    dp = 1 if options.get("dp") is None else options["dp"]
    given = {
        "device": args.device.type,
        "seed": options.pop("seed", None) or args.seed,
        "precision": _precision(args, options.pop("precision", None)),
    }
    if accumulation > 1:
        _check_microbatches(accumulation, options.pop("microbatches", None))
        given |= {"microbatches": accumulation, "loss_normalization": "microbatch"}
    seen = copy.copy(args)
    if getattr(args, "torch_compile", False):
        given["backend"] = _backend(args, options.pop("backend", None))
    if _recomputes(args):
        if options.get("remat") not in (None, "full"):
            raise OptionError("gradient_checkpointing= beside remat= in pipeline=: give one")
        given["remat"] = "full"
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if hasattr(seen, name):
                setattr(seen, name, False)  # else the Trainer puts it into the model
    return Settings(options | given, seen, accumulation, options["n_stages"], dp)


def _check(args: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(options.get("n_stages"), int):
        raise OptionError(
            'pipeline= needs n_stages, a number: pipeline={"n_stages": 2}. What the batch of '
            'n_stages="auto" is depends on dp, which it is to find'
        )
    if getattr(args, "train_sampling_strategy", "") == "batch_rebalance":
        raise OptionError(
            'train_sampling_strategy="batch_rebalance" makes batches of other sizes for each '
            'replica: use "group_by_length"'
        )
    dp = options.get("dp") or 1
    if not getattr(args, "average_tokens_across_devices", True) and dp > 1:
        raise OptionError(
            "average_tokens_across_devices=False lets each replica count its own tokens, and the "
            "pipeline has the loss of the whole batch: leave it out"
        )
    accelerator = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator, name, None):
            raise OptionError(f"accelerator_config {name}=True: replicas get whole batches")


def _check_microbatches(accumulation: int, microbatches: int | None) -> None:
    if microbatches not in (None, accumulation):
        raise OptionError(
            f"gradient_accumulation_steps={accumulation} are the microbatches of a step, and "
            f"pipeline= has microbatches={microbatches}: leave one of them out"
        )


def _precision(args: Any, given: Any) -> Any:
    asked = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    if asked and given is not None:
        raise OptionError(f"{asked}=True beside precision={given!r} in pipeline=: give one of them")
    return asked or given


def _backend(args: Any, given: Any) -> str:
    if args.torch_compile_backend not in (None, "inductor"):
        raise OptionError(
            f"torch_compile_backend={args.torch_compile_backend!r}: a pipeline compiles with "
            '"inductor"'
        )
    if given not in (None, "inductor"):
        raise OptionError(f"torch_compile=True beside backend={given!r}: give one of them")
    return "inductor"


def _recomputes(args: Any) -> bool:
    names = "activation_checkpointing", "gradient_checkpointing"
    for name in names:
        kept = dict(getattr(args, f"{name}_kwargs", None) or {})
        kept.pop("use_reentrant", None)
        if kept:
            raise OptionError(
                f"{name}_kwargs={kept}: a pipeline recomputes each layer, or as remat= in "
                "pipeline= says"
            )
    return any(getattr(args, name, False) for name in names)
