"""Parameters are cast, and not operators: what `precision="bf16_params"` and "fp16_params" mean.

The pipeline computes what this loop computes on one device, bit for bit::

    working = model.to(torch.bfloat16)               # parameters and buffers
    masters = {name: its values in fp32}             # what the optimizer has
    for piece in microbatches:
        loss = working(**piece in bf16).loss         # floating tensors of the arguments
        (loss / len(microbatches)).backward()
        masters[name].grad += working[name].grad.float(), and that one is cleared
    clip; optimizer.step()                           # all in fp32
    working[name] = masters[name].to(torch.bfloat16)

=====================  ==========================================================================
parameters             fp32 masters, also of a model that comes in bf16, and a copy that is cast
                       once per step. Frozen ones stay as small as they came
gradients              bf16 in each microbatch, as autograd makes them; their sums, the exchange
                       between replicas, the norm and optimizer states are fp32
buffers                are read in bf16 (batch norm's averages, ``inv_freq`` of rotary embeddings),
                       as by ``model.to``; held, saved and returned in the dtype that they came in
arguments              floating tensors that the model is given are cast; those of ``loss_fn`` not
loss, outputs          in the dtype that the model and ``loss_fn`` give them: models of
                       transformers widen logits before the loss, which is fp32 then
a loss module          what it alone has stays as it is: it is not the model's
tensors in attributes  stay as they are, as ``model.to`` does not know them
islands                modules in ``fp32_modules``: parameters and buffers are read in fp32,
                       floating arguments are widened, floating results rounded to bf16
=====================  ==========================================================================

The model is traced with parameters and buffers of those dtypes, so that whatever it decides by a
dtype (``x.to(weight.dtype)``, ``torch.finfo(x.dtype).min``) it decides as ``model.to`` would; there
is no list of operators. FSDP2's ``MixedPrecisionPolicy(param_dtype=torch.bfloat16,
reduce_dtype=torch.float32)``, DeepSpeed's ``bf16`` and Megatron's ``--bf16`` mean the same, but
that FSDP2 leaves buffers as they are; an island is FSDP2's group with ``param_dtype=torch.float32,
output_dtype=torch.bfloat16``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from ..ir.errors import OptionError
from ..ir.precision import REDUCED, Precision
from ..tensors.fakes import FakeTensorMode
from ..tensors.pytree import tree_leaves, tree_map
from .whole import loss_of, model_of

_SHOWN = 6  # names in an error
_WIDE = torch.float32


@dataclass(frozen=True)
class Slot:
    """Where a module has a parameter or a buffer."""

    part: nn.Module
    key: str

    @property
    def tensor(self) -> torch.Tensor:
        found: torch.Tensor = self._owner[self.key]
        return found

    def put(self, tensor: torch.Tensor) -> None:
        self._owner[self.key] = tensor

    @property
    def _owner(self) -> dict[str, Any]:
        return self.part._parameters if self.key in self.part._parameters else self.part._buffers


@dataclass(frozen=True)
class Narrowing:
    """Of one copy of a model.

    Attributes:
        compute: the dtype that operators read.
        slots: what is read in it, and held in another.
    """

    compute: torch.dtype
    slots: tuple[Slot, ...]

    @staticmethod
    def of(
        whole: nn.Module, precision: Precision | None, aside: Collection[str] = ()
    ) -> Narrowing | None:
        """What is to be done with a copy of a model, which gets its islands' borders; None if
        nothing is.

        Args:
            whole: the model, with its loss where that is a module.
            aside: buffers of the copy that are none of the model.

        Raises:
            OptionError: an island that there is not, or that shares a tensor with what is none.
        """
        compute = None if precision is None else precision.narrows
        if precision is None or compute is None:
            return None
        model = model_of(whole)
        islands = islands_of(model, precision)
        inner = {part for island in islands.values() for part in island.modules()}
        kept = {
            id(slot.tensor): name
            for name, island in islands.items()
            for slot in _slots(island.modules())
        }
        slots = []
        for name, part in model.named_modules():
            if part in inner:
                continue
            for slot in _slots([part]):
                path = f"{name}.{slot.key}".lstrip(".")
                if path in aside or not slot.tensor.is_floating_point():
                    continue
                if id(slot.tensor) in kept:
                    raise OptionError(
                        f"fp32_modules: {kept[id(slot.tensor)]!r} shares {path!r} with {name!r}, "
                        f"which computes in {compute}: name both of them, or neither"
                    )
                if slot.tensor.dtype is not compute:
                    slots.append(slot)
        of_model = {id(slot.tensor) for slot in slots}
        if (loss := loss_of(whole)) is not None:  # it may have some of the model's
            slots += [slot for slot in _slots(loss.modules()) if id(slot.tensor) in of_model]
        for island in islands.values():
            add_border(island, compute)
        return Narrowing(compute, tuple(slots))

    @staticmethod
    @torch.no_grad()
    def into(whole: nn.Module, precision: Precision) -> None:
        """Narrow a model that has values, for good; arguments as of `of`."""
        for island in islands_of(model_of(whole), precision).values():
            _convert((s for s in _slots(island.modules()) if s.tensor.dtype in REDUCED), _WIDE)
        made = Narrowing.of(whole, precision)
        if made is not None:
            _convert(made.slots, made.compute)

    @contextmanager
    def entered(self, mode: FakeTensorMode) -> Iterator[None]:
        """Inside, the copy has fake tensors of the dtypes that operators read."""
        before = [slot.tensor for slot in self.slots]
        made: dict[int, torch.Tensor] = {}
        for slot, tensor in zip(self.slots, before, strict=True):
            if id(tensor) not in made:
                made[id(tensor)] = self._narrow(tensor, mode)
            slot.put(made[id(tensor)])
        try:
            yield
        finally:
            for slot, tensor in zip(self.slots, before, strict=True):
                slot.put(tensor)

    def _narrow(self, tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
        with mode, torch.no_grad():
            return _alike(torch.empty_like(tensor, dtype=self.compute), tensor)


def islands_of(model: nn.Module, precision: Precision) -> dict[str, nn.Module]:
    """The outermost modules that stay in fp32, by name; of one without a forward those in it.

    Raises:
        OptionError: a pattern that stands for no module.
    """
    found: dict[str, nn.Module] = {}
    containers: set[str] = set()
    left = set(precision.fp32_modules)
    names = {name: part for name, part in model.named_modules() if name}
    for name, part in names.items():
        met = {pattern for pattern in precision.fp32_modules if fnmatchcase(name, pattern)}
        left -= met
        within = name.rpartition(".")[0] in containers
        if not (met or within) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if type(part).forward is nn.Module.forward:
            containers.add(name)
        else:
            found[name] = part
    if left:
        few = ", ".join(map(repr, list(names)[:_SHOWN])) or "none"
        more = " and more" if len(names) > _SHOWN else ""
        raise OptionError(
            f"fp32_modules: {min(left)!r} stands for no module of the model, which has {few}{more}"
        )
    return found


def add_border(island: nn.Module, compute: torch.dtype) -> None:
    """Let a module be given floating tensors in fp32, and return them in the dtype around it."""
    island.register_forward_pre_hook(_enter, with_kwargs=True)
    island.register_forward_hook(partial(_leave, compute=compute))


def _enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return cast_floats((args, kwargs), _WIDE)


def _leave(_: nn.Module, __: Any, output: Any, compute: torch.dtype) -> Any:
    return cast_floats(output, compute)


def cast_floats(values: Any, dtype: torch.dtype) -> Any:
    """The same structure with all floating tensors in it in a dtype; itself if they are."""
    if any(_is_other(leaf, dtype) for leaf in tree_leaves(values)):
        return tree_map(lambda leaf: leaf.to(dtype) if _is_other(leaf, dtype) else leaf, values)
    return values


def _is_other(leaf: object, dtype: torch.dtype) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype is not dtype


def _convert(slots: Iterable[Slot], dtype: torch.dtype) -> None:
    """Put tensors of another dtype into some places; what was one stays one."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id; kept alive
    for slot in slots:
        tensor = slot.tensor
        if id(tensor) not in made:
            made[id(tensor)] = tensor, _alike(tensor.detach().to(dtype), tensor)
        slot.put(made[id(tensor)][1])


def _alike(made: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter where a tensor is one."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _slots(parts: Iterable[nn.Module]) -> Iterator[Slot]:
    for part in parts:
        for owner in (part._parameters, part._buffers):
            yield from (Slot(part, key) for key, tensor in owner.items() if tensor is not None)
