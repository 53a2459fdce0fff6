"""Training over ``model.to(bfloat16)`` with fp32 masters, as a textbook writes it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from support import jobs, models, plain

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMED = {"bf16_params": BF16, "fp16_params": FP16}


@functools.cache
def oracle(name: str, precision: str, dp: int = 1, islands: tuple[str, ...] = ()) -> plain.Trained:
    """Of a test model: two steps of eight rows."""
    run = Loop(models.build(name), jobs.OPTIMIZERS["adamw"], NAMED[precision], islands)
    return run.train(models.batches(name, 8, 2), dp, 4 // dp)


def cast(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, torch.Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, dict):
        return type(values)((key, cast(value, dtype)) for key, value in values.items())
    if isinstance(values, (tuple, list)):
        return type(values)(cast(value, dtype) for value in values)
    return values


def keep_in_fp32(part: nn.Module, original: nn.Module, dtype: torch.dtype) -> None:
    """A module that is given fp32, and returns what is around it."""
    part.float()
    values = dict(original.named_parameters()) | dict(original.named_buffers())
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        tensor.data.copy_(values[name])
    part.register_forward_pre_hook(
        lambda _, args, kwargs: (cast(args, FP32), cast(kwargs, FP32)), with_kwargs=True
    )
    part.register_forward_hook(lambda _, __, output: cast(output, dtype))


class Loop:
    """Args:
    model: it is changed.
    islands: names of modules that stay in fp32.
    call: a model and a batch -> the loss.

    Attributes:
        masters: name -> what the optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        dtype: torch.dtype = BF16,
        islands: Iterable[str] = (),
        init_scale: float = 2.0**16,
        call: Callable[[nn.Module, Any], torch.Tensor] = lambda model, batch: model(**batch).loss,
    ):
        named = list(model.named_parameters())
        self.masters = {n: nn.Parameter(p.detach().float().clone()) for n, p in named}
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        original = copy.deepcopy(model)
        self.dtype, self.model, self._call = dtype, model.to(dtype), call
        for name in islands:
            keep_in_fp32(model.get_submodule(name), original.get_submodule(name), dtype)
        trained = [self.masters[n] for n, p in named if p.requires_grad]
        self.optimizer = optimizer(trained)
        fp16 = dtype is FP16
        self.scaler = torch.amp.GradScaler("cpu", init_scale, enabled=fp16)

    def accumulate(self, batch: dict[str, torch.Tensor], dp: int, pieces: int) -> torch.Tensor:
        """The mean over replicas in the masters' ``.grad``; returns the loss."""
        sums: list[dict[str, torch.Tensor]] = []
        losses = []
        for shard in plain.cut(batch, dp):
            total: dict[str, torch.Tensor] = {}
            found = []
            for piece in plain.cut(shard, pieces):
                loss = self._call(self.model, cast(piece, self.dtype))
                (self.scaler.scale(loss) / pieces).backward()
                found.append(loss.detach())
                for name, param in self.model.named_parameters():
                    if param.grad is not None:
                        grad, param.grad = param.grad.float(), None
                        total[name] = total[name] + grad if name in total else grad
            sums.append(total)
            losses.append(torch.stack(found).mean())
        for name in sums[0]:
            self.masters[name].grad = sum(total[name] for total in sums) / dp
        return torch.stack(losses).mean()

    def train(
        self,
        batches: list[dict[str, torch.Tensor]],
        dp: int = 1,
        microbatches: int = 1,
        max_norm: float = 0.1,
    ) -> plain.Trained:
        """Several steps with clipping active; a step that the scaler skips has no gradients."""
        run, params = plain.Trained([], [], [], {}), list(self.masters.values())
        for batch in batches:
            run.losses.append(self.accumulate(batch, dp, microbatches))
            self.scaler.unscale_(self.optimizer)
            grads = {n: p.grad.clone() for n, p in self.masters.items() if p.grad is not None}
            if all(grad.isfinite().all() for grad in grads.values()):
                run.grads.append(grads)
                run.norms.append(nn.utils.clip_grad_norm_(params, max_norm))
            else:
                run.grads.append({})
                run.norms.append(torch.zeros(()))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            with torch.no_grad():
                for name, param in self.model.named_parameters():
                    if param.requires_grad:
                        param.copy_(self.masters[name])
        run.params = self.state()
        return run

    def state(self) -> dict[str, torch.Tensor]:
        """What a pipeline saves: masters, and buffers in the dtypes that they came in."""
        first = {id(param): name for name, param in self.model.named_parameters()}
        found = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            before = self.before[name]
            if id(value) in first and value.requires_grad:
                found[name] = self.masters[first[id(value)]].detach().clone()
            else:
                same = torch.equal(before.to(value.dtype), value)
                found[name] = before if same else value.detach().to(before.dtype)
        return found
