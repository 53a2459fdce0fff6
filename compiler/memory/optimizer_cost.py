"""What a user's optimizer takes: bytes of its states, bytes during a step, seconds per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import nn

from ..host.caches import other_memory
from ..tensors.facts import layout_of
from ..tensors.fakes import is_fake, weightless
from ..tensors.pytree import tree_leaves
from .meter import StorageMeter
from .repeats import Repeats, repeats_in

Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]

# Of dummy parameters; gradients and states come on top. With less than this a large optimizer step
# seems up to twice as fast as it is: its temporaries come from pages that are there already.
SAMPLE_BYTES = 64 << 20
OTHERS_BYTES = 256 << 20  # what microbatches touch between two steps: caches are theirs
STEPS = 5
FEW = ((1, 2), (2, 3))  # of the pieces that repeat so many are stepped
_STEP = 100.0  # what a fake step counter reads: late enough for what optimizers do after a warm-up


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes that an optimizer needs beyond parameters and gradients.

    Attributes:
        state_bytes: parameter name -> bytes of its states, kept between steps.
        shared_bytes: kept besides, for no parameter in particular.
        transient_bytes: at most alive during a step, beyond parameters, gradients and states.
        exact: computed for the true shapes; False if scaled up from smaller parameters.
    """

    state_bytes: dict[str, int]
    shared_bytes: int
    transient_bytes: int
    exact: bool = True

    @property
    def total_state_bytes(self) -> int:
        return sum(self.state_bytes.values()) + self.shared_bytes


def optimizer_memory(factory: Factory, params: Mapping[str, torch.Tensor]) -> OptimizerMemory:
    """Bytes of an optimizer over parameters of which shapes, strides and dtypes are known.

    Runs two steps on fake tensors: the first makes the states, the second is measured. An optimizer
    that cannot run without data runs on small parameters instead, and their bytes are scaled.
    torch's own optimizers go by layouts alone: what is known of some is taken for all that are
    alike, and one and two of the layers that repeat are stepped, which tell what all take.

    Args:
        factory: called with named parameters, as `pipecompile.compile` does.
        params: FQN -> a tensor, real, fake or meta; only its shape, strides, dtype and device
            matter. Give those of one stage for the bytes during a step of that stage.
    """
    try:
        with weightless():
            return _of_repeats(factory, params)
    except Exception:
        share = _share(params)
        small = _shrunk(params, share)
        cpu = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in small.items()}
        found = _memory(factory, cpu)
        scale = {name: p.numel() / max(1, small[name].numel()) for name, p in params.items()}
        states = {name: round(n * scale[name]) for name, n in found.state_bytes.items()}
        rest = round(found.shared_bytes / share), round(found.transient_bytes / share)
        return OptimizerMemory(states, *rest, exact=False)


def on_cuda(params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same layouts on a GPU, which need not be there: torch's optimizers step all parameters at
    once there, with temporaries as large as these. Parameters that are alike get one tensor."""
    made: dict[object, torch.Tensor] = {}
    with weightless():
        for p in params.values():
            if p.device.type == "cpu" and layout_of(p) not in made:
                made[layout_of(p)] = torch.empty_strided(
                    p.shape, p.stride(), dtype=p.dtype, device="cuda"
                )
    return {name: made.get(layout_of(p), p) for name, p in params.items()}


_known: dict[Any, tuple[tuple[int, ...], int, int]] = {}
"""(how, optimizer of torch, default dtype, layouts) -> bytes: states of each, shared, transient."""
_MOST_KNOWN = 1_000


def _of_repeats(factory: Factory, params: Mapping[str, torch.Tensor]) -> OptimizerMemory:
    """As `_memory`, for fake tensors."""
    if _settings(factory) is None:
        return _memory(factory, params)
    layouts = tuple(map(layout_of, params.values()))

    def found() -> OptimizerMemory:
        return _extended(factory, params, layouts) or _stepped(factory, params)

    return _once(factory, params, found, "of repeats")


def _stepped(factory: Factory, params: Mapping[str, torch.Tensor]) -> OptimizerMemory:
    """As `_memory`, once for all parameters of the same layouts."""
    return _once(factory, params, lambda: _memory(factory, params), "stepped")


def _once(
    factory: Factory,
    params: Mapping[str, torch.Tensor],
    found: Callable[[], OptimizerMemory],
    how: str,
) -> OptimizerMemory:
    """What was found of parameters of the same layouts, in the same order, where torch's own
    optimizer steps them."""
    settings = _settings(factory)
    if settings is None:
        return found()
    layouts = tuple(map(layout_of, params.values()))
    key = how, settings, torch.get_default_dtype(), layouts
    if key not in _known:
        memory = found()
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        states = tuple(memory.state_bytes[name] for name in params)
        _known[key] = states, memory.shared_bytes, memory.transient_bytes
    states, shared, transient = _known[key]
    return OptimizerMemory(dict(zip(params, states, strict=True)), shared, transient)


def _settings(factory: Factory) -> Any:
    """What an optimizer of torch's is made with, as data; None for others and where that is more
    than plain values."""
    made = factory if isinstance(factory, partial) else partial(factory)
    given = made.args, tuple(sorted(made.keywords.items()))
    return (made.func, given, _typed(given)) if is_torchs(made.func) and _is_plain(given) else None


def is_torchs(kind: object) -> bool:
    """Whether a class is an optimizer of torch's own."""
    return isinstance(kind, type) and kind.__module__.startswith("torch.optim.")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _typed(value: Any) -> Any:
    """The types of plain values: 1 is no True."""
    return tuple(map(_typed, value)) if isinstance(value, tuple) else type(value)


def _extended(
    factory: Factory, params: Mapping[str, torch.Tensor], layouts: tuple[object, ...]
) -> OptimizerMemory | None:
    """From one and two pieces of those that repeat, or from two and three; None where they do not
    tell the same, or nothing repeats."""
    repeats = repeats_in(layouts)
    if repeats is None:
        return None
    few = (_told_by(few, repeats, factory, params) for few in FEW)
    return next((found for found in few if found is not None), None)


def _told_by(
    few: tuple[int, int], repeats: Repeats, factory: Factory, params: Mapping[str, torch.Tensor]
) -> OptimizerMemory | None:
    """The peak of a step is the largest of several sums, each of which grows evenly with the
    pieces. Without what does not repeat, the one that grows most is the largest: if the peak grows
    as that one does, it goes on to.

    Args:
        few: numbers of pieces, one after the other.
    """
    names = list(params)
    run = range(repeats.start, repeats.start + repeats.length * repeats.count)
    told, during, alone = [], [], []
    for count in few:
        kept = [names[i] for i in repeats.kept(count, len(names))]
        found = _stepped(factory, {name: params[name] for name in kept})
        states = [found.state_bytes[name] for name in kept]
        own = [states[repeats.twin(i, count)] for i in range(len(names))]
        told.append((own, found.shared_bytes))
        during.append(found.transient_bytes)
        pieces = {names[i]: params[names[i]] for i in run[: count * repeats.length]}
        alone.append(_stepped(factory, pieces).transient_bytes)
    more = alone[1] - alone[0]
    proportional = few[0] * alone[1] == few[1] * alone[0]
    if told[0] != told[1] or during[1] - during[0] != more or not (proportional or not more):
        return None
    own, shared = told[0]
    transient = during[1] + (repeats.count - few[1]) * more
    return OptimizerMemory(dict(zip(names, own, strict=True)), shared, transient)


def answering(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator; one that asks for the value of a fake tensor gets a number."""
    if func is torch.ops.aten._local_scalar_dense.default and is_fake(args[0]):
        return _STEP if args[0].is_floating_point() else 1
    return func(*args, **kwargs)


def _uncomputed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `answering`, for operands without data and an optimizer that works: an operator that only
    writes into what it is given has no result to work out, which is most of a step's time."""
    if _writes_elements(func):
        return args[0] if func._schema.returns else None
    return answering(func, args, kwargs)


@cache
def _writes_elements(func: Any) -> bool:
    """Whether an operator does no more than replace elements of its first operand, which keeps its
    memory and layout."""
    schema = func._schema
    if not schema.arguments or schema.arguments[0].alias_info is None:
        return False
    if not schema.arguments[0].alias_info.is_write:
        return False
    if schema.name.startswith("aten::_foreach_"):
        return not schema.returns
    returns = [each.alias_info for each in schema.returns]
    return torch.Tag.pointwise in func.tags and len(returns) == 1 and returns[0] is not None


def _memory(factory: Factory, params: Mapping[str, torch.Tensor]) -> OptimizerMemory:
    named = _parameters(params)
    held = [t for p in named.values() for t in (p, p.grad) if t is not None]
    fake = all(map(is_fake, held)) and _settings(factory) is not None
    with StorageMeter(_uncomputed if fake else answering) as meter:
        optimizer = factory(list(named.items()))
        _choose_foreach(optimizer)
        optimizer.step()
        before = meter.current_bytes
        meter.restart()
        optimizer.step()
        transient = meter.peak_bytes - before
    mine = {t.untyped_storage() for t in held}
    states = {}
    for name, param in named.items():
        found = {
            leaf.untyped_storage()
            for leaf in tree_leaves(optimizer.state.get(param, {}))
            if isinstance(leaf, torch.Tensor)
        }
        states[name] = sum(storage.nbytes() for storage in found - mine)
        mine |= found
    shared = max(0, before - sum(states.values()))
    return OptimizerMemory(states, shared, transient)


def _choose_foreach(optimizer: torch.optim.Optimizer) -> None:
    """On CUDA torch takes the foreach kernels for plain tensors, but not for fake ones."""
    for group in optimizer.param_groups:
        on_gpu = all(p.device.type == "cuda" for p in group["params"])
        undecided = "foreach" in group and group["foreach"] is None and not group.get("fused")
        if on_gpu and undecided and not group.get("differentiable"):
            group["foreach"] = True


def optimizer_seconds(
    factory: Factory,
    params: Mapping[str, torch.Tensor],
    device: torch.device,
    norm: Callable[[torch.Tensor], Any] | None = None,
) -> float:
    """Seconds of one step, measured on dummy parameters and scaled by bytes.

    A step takes so much per parameter and so much per byte; two sizes of the same parameters, cut
    along their first dimension, tell one from the other.

    Args:
        params: FQN -> a tensor of which only shape and dtype matter.
        device: where to measure.
        norm: of a gradient, where steps clip by the norm of all: then they are scaled, too.
    """
    share = _share(params)
    large = _shrunk(params, share)
    large_s = _step_seconds(factory, large, device, norm)
    if share == 1:
        return large_s
    small = _shrunk(params, share / 4)
    small_s = _step_seconds(factory, small, device, norm)
    step_bytes = _nbytes(large) - _nbytes(small)
    per_byte = max(0.0, large_s - small_s) / step_bytes if step_bytes > 0 else 0.0
    return large_s + per_byte * (_nbytes(params) - _nbytes(large))


def _step_seconds(
    factory: Factory,
    params: Mapping[str, torch.Tensor],
    device: torch.device,
    norm: Callable[[torch.Tensor], Any] | None,
) -> float:
    real = {
        name: torch.full(p.shape, 0.02, dtype=p.dtype, device=device) for name, p in params.items()
    }
    parameters = _parameters(real)
    optimizer = factory(list(parameters.items()))
    grads = [param.grad for param in parameters.values() if param.grad is not None]
    scale, seconds = torch.ones((), device=device), []
    others = other_memory(device, OTHERS_BYTES)
    for _ in range(1 + STEPS):
        others.fill_(1)
        start = time.perf_counter()
        if norm is not None:
            for grad in grads:
                norm(grad)
            for grad in grads:
                grad.mul_(scale)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])  # the first makes the states


def _parameters(params: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """New parameters of the same shapes, with gradients; fake where fakes are made."""
    made = {}
    for name, like in params.items():
        room = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        made[name] = nn.Parameter(room if is_fake(room) else room.fill_(0.02))
        grad = torch.empty_like(room)
        made[name].grad = grad if is_fake(grad) else grad.fill_(0.01)
    return made


def _share(params: Mapping[str, torch.Tensor]) -> float:
    """The share of the first dimensions that leaves about `SAMPLE_BYTES`."""
    return min(1.0, SAMPLE_BYTES / max(1, _nbytes(params)))


def _shrunk(params: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """The same parameters, shorter along the first dimension; without data."""
    return {
        name: torch.empty(_shorter(p.shape, share), dtype=p.dtype, device="meta")
        for name, p in params.items()
    }


def _shorter(shape: torch.Size, share: float) -> tuple[int, ...]:
    return tuple(shape) if not shape else (max(1, round(shape[0] * share)), *shape[1:])


def _nbytes(params: Mapping[str, torch.Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in params.values())
