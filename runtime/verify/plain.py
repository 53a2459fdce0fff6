"""The user's model in eager PyTorch, in one process: what a pipeline is compared with.

It accumulates gradients over the same microbatches, replica by replica, and draws its dropout from
the seeds that the pipeline draws from.

`TorchDispatchMode` is torch's hook below autograd; its module has no public name.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...compiler.capture.batch import BatchSpec
from ...compiler.capture.calling import Call, bind, find_loss
from ...compiler.capture.narrowing import cast_floats
from ...compiler.capture.skeleton import evaluating, named_state
from ...compiler.capture.whole import loss_of, model_of
from ...compiler.ir.errors import OptionError
from ...compiler.ir.ops import draws, generator_of, mix
from ...compiler.ir.precision import autocast
from ...compiler.options.options import CompileOptions
from ...compiler.options.schedulers import make_scheduler, steps_alone
from ...compiler.profiling.standins import called
from ...compiler.rows.loss import Weights, loss_of_batch, loss_of_replica
from ...compiler.tensors.fakes import is_fake
from .masters import Masters

Leaves = Sequence[torch.Tensor]
Tensors = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """Of one step.

    Attributes:
        norm: of the gradients before they were clipped; None where they are not.
        grads: as they were added up, before clipping.
        params, buffers: after the step; buffers are the first replica's.
    """

    loss: torch.Tensor
    norm: torch.Tensor | None
    grads: Tensors
    params: Tensors
    buffers: Tensors


class Plain:
    """A copy of a model, and of its loss where that is a module, with an optimizer of its own.

    Attributes:
        evaluation_updates: whether evaluation has changed buffers, so that a whole batch sees
            others than its microbatches do.

    Raises:
        OptionError: the model has no values to copy, or the scheduler needs a metric.
    """

    evaluation_updates = False

    def __init__(self, model: nn.Module, options: CompileOptions, device: torch.device):
        self._options, self._device = options, device
        self.whole = _copied(model).to(device)
        self.model = model_of(self.whole)
        self._masters = Masters(self.whole, options.mixed)
        loss = loss_of(self.whole)
        self._loss_fn = options.loss_fn if loss is None else loss
        self._updated: frozenset[str] = frozenset()
        self._replicas = [self._buffers() for _ in range(options.dp)]
        assert options.optimizer is not None
        self._optimizer = called(options.optimizer, list(self._masters.params.items()))
        self._scheduler = _scheduler(options, self._optimizer)

    @torch.enable_grad()
    def step(
        self,
        shares: Sequence[Sequence[Leaves]],
        spec: BatchSpec,
        seeds: Sequence[Sequence[int]],
        weights: Weights,
        eager: Collection[str] = (),
        updated: Collection[str] = (),
    ) -> Outcome:
        """Train on a batch.

        Args:
            shares: per replica, the leaves of its microbatches.
            spec: of a microbatch.
            seeds: per replica and microbatch.
            weights: what these count.
            eager: submodules of which a call draws from one seed.
            updated: frozen parameters that forward updates.
        """
        self._keep(updated)
        totals: list[Tensors] = []
        losses = []
        for replica, (pieces, drawn) in enumerate(zip(shares, seeds, strict=True)):
            self._set_buffers(self._replicas[replica])
            found = []
            tangents = weights.tangents[replica]
            for leaves, seed, tangent in zip(pieces, drawn, tangents, strict=True):
                with self._drawing(seed, eager), self._autocast():
                    loss = self._loss(leaves, spec)
                torch.autograd.backward(loss * tangent)
                self._masters.take()
                found.append(loss.detach())
            losses.append(_together(found, weights, replica))
            self._replicas[replica] = self._buffers()
            totals.append(self._taken())
        params = self._masters.params
        for name, param in params.items():
            parts = [total[name] for total in totals if name in total]
            param.grad = _mean(parts, len(shares)) if parts else None
        grads = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
        norm = None
        if self._options.max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(list(params.values()), self._options.max_grad_norm)
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        self._optimizer.zero_grad()
        self._masters.spread()
        after = {n: p.detach().clone() for n, p in params.items() if n not in updated}
        whole = loss_of_batch(torch.stack(losses), weights, loss.dtype)
        return Outcome(whole, norm, grads, after, self._replicas[0])

    @torch.no_grad()
    def evaluate(
        self, shares: Sequence[Sequence[Leaves]], spec: BatchSpec, weights: Weights
    ) -> torch.Tensor:
        """The loss of a batch in evaluation mode; arguments as of `step`."""
        losses, before, dtype = [], self._replicas[0], torch.float32
        with evaluating(self.whole):
            for replica, pieces in enumerate(shares):
                self._set_buffers(self._replicas[replica])
                with self._autocast():
                    found = [self._loss(leaves, spec) for leaves in pieces]
                dtype = found[0].dtype if found else dtype
                losses.append(_together(found, weights, replica))
                self._replicas[replica] = self._buffers()
        after = self._replicas[0]
        self.evaluation_updates = any(not torch.equal(before[name], after[name]) for name in before)
        return loss_of_batch(torch.stack(losses), weights, dtype)

    @property
    def fuses(self) -> bool:
        """Whether torch evaluates a part of the model in fused kernels, which no graph has and
        which round otherwise (`torch.backends.mha`)."""
        kinds = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
        return torch.backends.mha.get_fastpath_enabled() and any(
            isinstance(part, kinds) for part in self.whole.modules()
        )

    @torch.no_grad()
    def outputs(self, whole: Leaves, spec: BatchSpec) -> Any:
        """What the model returns for a whole batch, in evaluation mode."""
        with evaluating(self.whole), self._autocast():
            batch = spec.build([leaf.to(self._device) for leaf in whole])
            return self._output(bind(self.model, batch, None), batch)

    def _loss(self, leaves: Leaves, spec: BatchSpec) -> torch.Tensor:
        batch = spec.build([leaf.to(self._device) for leaf in leaves])
        output = self._output(bind(self.model, batch, self._loss_fn), batch)
        return find_loss(output, batch, self._loss_fn)

    def _output(self, call: Call, batch: Any) -> Any:
        given = call.arguments(batch)
        mixed = self._options.mixed
        if mixed is not None and mixed.narrows is not None:
            given = cast_floats(given, mixed.narrows)
        args, kwargs = given
        return self.model(*args, **kwargs)

    def _taken(self) -> Tensors:
        """The gradients, which are gone from the parameters then."""
        params = self._masters.params
        found = {n: p.grad for n, p in params.items() if p.grad is not None}
        for param in params.values():
            param.grad = None
        return found

    def _keep(self, updated: Collection[str]) -> None:
        """Handle some more parameters as the buffers of each replica."""
        self._updated = frozenset(updated)
        for name in updated:
            for buffers in self._replicas:
                buffers.setdefault(name, self.whole.get_parameter(name).detach().clone())

    def _buffers(self) -> Tensors:
        return {
            name: tensor.detach().clone()
            for name, tensor in named_state(self.whole)
            if name in self._updated or not isinstance(tensor, nn.Parameter)
        }

    def _set_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            if name in self._updated:
                self.whole.get_parameter(name).data = value.clone()
                continue
            path, _, attribute = name.rpartition(".")
            setattr(self.whole.get_submodule(path), attribute, value.clone())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        mixed = self._options.mixed
        return autocast(None if mixed is None else mixed.autocasts, self._device)

    @contextlib.contextmanager
    def _drawing(self, seed: int, eager: Collection[str]) -> Any:
        devices = [self._device] if self._device.type == "cuda" else []
        draws = _Draws(seed, self._device)
        hooks = []
        for part in map(self.model.get_submodule, eager):
            hooks.append(part.register_forward_pre_hook(draws.enter, prepend=True))
            hooks.append(part.register_forward_hook(draws.leave))
        try:
            with torch.random.fork_rng(devices), draws:
                yield
        finally:
            for hook in hooks:
                hook.remove()


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random operators draw as `compiler.ir.ops.seeded` does: from the seed and their number."""

    def __init__(self, seed: int, device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._device, self._count = seed, device, 0
        self._whole = False

    def enter(self, *_: Any) -> None:
        """What follows draws from one seed."""
        self._begin()
        self._whole = True

    def leave(self, *_: Any) -> None:
        self._whole = False

    def _begin(self) -> None:
        generator_of(self._device).manual_seed(mix(self._seed, self._count))
        self._count += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if not self._whole and draws(func, args, named):
            self._begin()
        return func(*args, **named)


def _together(losses: Sequence[torch.Tensor], weights: Weights, replica: int) -> torch.Tensor:
    """Of a replica, which may have no rows."""
    found = torch.stack(list(losses)) if losses else torch.zeros(0)
    return loss_of_replica(found, weights, replica)


def _mean(parts: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The mean over replicas, added in their order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / count


def _scheduler(options: CompileOptions, optimizer: torch.optim.Optimizer) -> Any:
    if options.lr_scheduler is None:
        return None
    scheduler = make_scheduler(options.lr_scheduler, optimizer)
    if not steps_alone(scheduler):
        raise OptionError(
            f"verify= steps the scheduler, and a {type(scheduler).__name__} needs a metric, which "
            "step() leaves to you: leave lr_scheduler= out while you verify"
        )
    return scheduler


def _copied(model: nn.Module) -> nn.Module:
    state = dict(named_state(model))
    empty = next((name for name, tensor in state.items() if is_fake(tensor)), None)
    if empty is not None:
        raise OptionError(
            f"verify= compares with a copy of the model in one process, and {empty!r} has no "
            "values: build a smaller model with weights for it, or leave verify= out"
        )
    memo = {id(t): t.detach().clone() for t in state.values() if not t.is_leaf}
    return copy.deepcopy(model, memo)
