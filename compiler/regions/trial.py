"""A call of a submodule is tried on numbers of no meaning, for what tracing cannot tell.

Twice, on different ones: results whose number or shapes depend on them are no node's.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..calibration.operators import form_of
from ..costs.formulas import flops_of, lacking
from ..ir.errors import RegionError
from ..ir.graph import tensors
from ..ir.ops import generator_of
from ..ir.region import Kernel, Work
from ..memory.meter import StorageMeter, storages_of
from ..tensors.facts import extent
from ..tensors.fakes import meta_like
from .site import Facts, Run, Site

T = TypeVar("T")


def tried(site: Site, operands: Sequence[torch.Tensor]) -> Facts:
    """What a call does.

    Args:
        operands: without values.

    Raises:
        RegionError: it does not run, or not as one node can.
    """
    try:
        return _elsewhere(lambda: _tried(site, operands))
    except RegionError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise _refused(
            site, f"it does not run by itself ({type(error).__name__}: {first})"
        ) from error


def _tried(site: Site, operands: Sequence[torch.Tensor]) -> Facts:
    first, second = _values(operands, 0), _values(operands, 1)
    attributes = _attributes(site)
    generator = generator_of(operands[0].device)
    drawn = generator.get_state()
    meter, counts = StorageMeter(), _Counts()
    with meter, counts:
        run = site.run(first)
    forward = Work(counts.kernels, max(0, meter.peak_bytes - meter.current_bytes))
    draws = not torch.equal(drawn, generator.get_state())
    again = site.run(second)
    _check_alike(site, run, again)
    if changed := [n for n, value in _attributes(site).items() if attributes.get(n) is not value]:
        raise _refused(site, f"it changes {changed[0]!r} of itself")
    names = len(site.state)
    for i, value in run.changed.items():
        if i >= names or site.needs[i]:
            raise _refused(site, "it changes an argument or a parameter in place")
        if (value.shape, value.dtype) != (first[i].shape, first[i].dtype):
            raise _refused(site, f"it gives {site.state[i]!r} another shape or dtype")
    counts, meter = _Counts(), StorageMeter()
    gradients: tuple[torch.Tensor, ...] = ()
    if site.trains:
        kept = {i: first[i] for i in run.saved.packing.kept}
        pairs = zip(run.outputs, run.differentiable, strict=True)
        ones = [torch.ones_like(output) if flows else None for output, flows in pairs]
        with meter, counts:
            made = run.saved.gradients(kept, ones, [None] * sum(site.needs))
        gradients = tuple(map(meta_like, made))
    backward = Work(counts.kernels, max(0, meter.peak_bytes - meter.current_bytes))
    # weights are there anyway, and which of them are read may depend on data
    needed = (
        (run.saved.packing.kept | set(range(names))) - set(run.changed) if site.trains else set()
    )
    return Facts(
        tuple(map(meta_like, (*run.outputs, *run.changed.values()))),
        run.tree,
        run.others,
        run.differentiable,
        tuple(run.changed),
        tuple(sorted(needed)),
        gradients,
        run.saved.packing.saved_bytes,
        draws,
        forward,
        backward,
    )


def _check_alike(site: Site, run: Run, again: Run) -> None:
    shapes, others = [[(t.shape, t.dtype) for t in each.outputs] for each in (run, again)]
    if shapes != others or run.tree != again.tree:
        raise _refused(site, "the shapes of its results depend on data")
    odd = next((value for value in run.others.values() if not _is_plain(value)), None)
    if odd is not None:
        raise _refused(site, f"it returns a {type(odd).__name__}", is_cache(odd))
    if run.others != again.others:
        raise _refused(site, "it returns Python values that depend on data")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def is_cache(value: object) -> bool:
    """Whether it is a cache of keys and values of transformers'."""
    return hasattr(value, "get_seq_length")


def _refused(site: Site, why: str, cache: bool = False) -> RegionError:
    text = f"module {site.path!r} cannot run eagerly inside a graph: {why}"
    return RegionError(text, cache=cache)


def _attributes(site: Site) -> dict[str, Any]:
    """What the submodules have besides tensors and modules."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, part in site.module.named_modules()
        for name, value in vars(part).items()
        if not name.startswith("_") and name != "training"
    }


def _values(operands: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Operands with small values: floating-point ones around zero, integers 0 or 1."""
    made = []
    for i, operand in enumerate(operands):
        device = operand.device
        flat = torch.empty(extent(operand), dtype=operand.dtype, device=device)
        generator = torch.Generator(device).manual_seed(100 * i + seed)
        if flat.is_floating_point() or flat.is_complex():
            flat.normal_(0, 0.5, generator=generator)
        elif flat.dtype is torch.bool:
            flat.fill_(True)
        else:
            flat.random_(0, 2, generator=generator)
        made.append(flat.as_strided(operand.shape, operand.stride()))
    return made


def _elsewhere(action: Callable[[], T]) -> T:
    """In a thread of its own, where nothing is being traced, with the random states put back."""
    found: list[T] = []
    errors: list[Exception] = []

    def act() -> None:
        try:
            found.append(action())
        except Exception as error:
            errors.append(error)

    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng():
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
    random.setstate(python)
    np.random.set_state(numpy)
    if errors:
        raise errors[0]
    return found[0]


class _Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What operators ran, and what each had to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        made = func(*args, **named)
        given = [*args, *named.values()]
        read = set(map(id, storages_of(given)))
        new = [t for t in tensors(made) if id(t.untyped_storage()) not in read]
        if not new and func._schema.is_mutable is False:
            return made  # a view
        flops = flops_of(func, args, named, made) or 0
        sources = [t for value in given for t in tensors(value)]
        moved = sum(t.numel() * t.element_size() for t in (*sources, *tensors(made)))
        dtype = str(sources[0].dtype).removeprefix("torch.") if sources else ""
        form = form_of(func, args, named) if flops else None
        self.kernels.append(Kernel(flops, moved, dtype, lacking(func), form=form))
        return made
