"""A copy of the user's model without its weights, which is all that compiling needs.

The copy is traced, switched to evaluation, given other flags; the user's model is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..answers.guards import Guards
from ..effects.attributes import Attributes, attributes_of, promote
from ..effects.outside import Originals, originals_of
from ..ir.errors import CaptureError, SharedStorageError
from ..ir.graph import JointGraph
from ..ir.precision import REDUCED, Precision
from ..regions.regions import Regions
from ..tensors.facts import extent, memory_of
from ..tensors.fakes import FakeTensor, FakeTensorMode
from ..tracing.likeness import Mark
from .narrowing import Narrowing, islands_of
from .whole import LOSS, loss_of, model_of


@dataclass(frozen=True)
class Skeleton:
    """A weightless copy of a model, and of its loss where that is a module (`whole.with_loss`).

    Attributes:
        module: the copy of both; every parameter and buffer is a fake tensor on the target device.
        mode: what made the fakes; inputs must come from the same mode.
        canonical: every name of a parameter, a buffer or an attribute -> the first name of the same
            tensor. Attributes are buffers of the copy.
        attributes: what is known of the attributes.
        originals: the tensors of the user's model.
        regions: which parts of it run eagerly.
        narrowing: which tensors operators read in another dtype than they are held in.
        updated: frozen parameters that forward updates, as far as graphs were made. They are
            handled as buffers.
    """

    module: nn.Module
    mode: FakeTensorMode
    canonical: dict[str, str]
    attributes: Attributes
    originals: Originals
    regions: Regions
    narrowing: Narrowing | None = None
    updated: set[str] = field(default_factory=set)

    @property
    def params(self) -> tuple[str, ...]:
        """Canonical parameter names, in ``named_parameters()`` order."""
        return tuple(name for name in self._names if name not in self.updated)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Of all parameters; steps ask for them, and walking through a deep module takes long."""
        return tuple(name for name, _ in self.module.named_parameters())

    @property
    def model(self) -> nn.Module:
        """The model's own copy."""
        return model_of(self.module)

    @property
    def loss_fn(self) -> nn.Module | None:
        """The loss's copy."""
        return loss_of(self.module)

    @property
    def floats(self) -> torch.dtype | None:
        """What is cast to, of what the model is given; None where it is taken as it is."""
        return None if self.narrowing is None else self.narrowing.compute

    @property
    def held(self) -> dict[str, torch.dtype]:
        """The dtype of every parameter and buffer between steps."""
        return {name: tensor.dtype for name, tensor in named_state(self.module)}

    def computing(self) -> AbstractContextManager[None]:
        """Inside, parameters and buffers have the dtypes in which operators read them."""
        return nullcontext() if self.narrowing is None else self.narrowing.entered(self.mode)

    def is_of_loss(self, name: str) -> bool:
        """Whether a tensor belongs to the loss alone, by the first of its names."""
        return self.loss_fn is not None and name.startswith(f"{LOSS}.")

    def values_of_buffers(self) -> dict[str, torch.Tensor]:
        """Those that the user's model has, where it is still there."""
        found = ((name, self.originals.get(name)) for name, _ in self.module.named_buffers())
        values = ((name, None if each is None else each()) for name, each in found)
        return {name: value for name, value in values if value is not None}

    def met(self, graph: JointGraph, lost: Mapping[str, str], guards: Guards) -> None:
        """One more graph of the model is there.

        Args:
            lost: attributes that the next call cannot read -> why.
            guards: what it was made by.

        Raises:
            CaptureError: it does not go with those that there were, or with itself.
        """
        named = dict(self.module.named_parameters())
        self.updated.update(named.keys() & graph.mutations.keys())
        read = {name for name, node in graph.buffers.items() if node.users}
        self.attributes.met(read, lost)
        self.attributes.asked(guards.buffers, (*graph.mutations, *lost))

    def fake(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """A contiguous fake tensor, for an input of the model."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=device)


def skeleton_of(
    model: nn.Module,
    device: torch.device,
    precision: Precision | None = None,
    eager_modules: Iterable[str] = (),
    training: bool = True,
) -> Skeleton:
    """Copy a model without its weights; parameters may be real, meta or already fake.

    Args:
        precision: what is trained in it has fp32 masters, whatever dtype the model has.
        eager_modules: names of submodules that run eagerly, as the option says.
        training: whether anything is; otherwise all of the copy is frozen.

    Raises:
        SharedStorageError: two different parameters overlap in memory.
        CaptureError: the model cannot be copied, or has gradient hooks.
        OptionError: the precision names a module that there is not.
    """
    _check_storage(model)
    if training:
        _check_hooks(model)
    state = dict(named_state(model))
    fakes = [t for t in state.values() if isinstance(t, FakeTensor)]
    mode = fakes[0].fake_mode if fakes else FakeTensorMode(allow_non_fake_inputs=True)
    wide = _widened(model, precision)
    memo: dict[int, Any] = {
        id(t): _fake_like(t, mode, device, torch.float32 if id(t) in wide else t.dtype, training)
        for t in state.values()
    }
    try:
        module = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model_of(model)).__name__} cannot be copied with copy.deepcopy ({error}): "
            "pipecompile traces a copy without weights; make its attributes copyable"
        ) from error
    names = promote(module)
    attributes = Attributes(names, _in_parameters(model, {n: state[n] for n in names}))
    first: dict[int, str] = {}
    canonical = {name: first.setdefault(id(t), name) for name, t in state.items()}
    originals = originals_of(state)
    regions = Regions(model_of(module), eager_modules)
    narrowing = Narrowing.of(module, precision, names)
    return Skeleton(module, mode, canonical, attributes, originals, regions, narrowing)


def named_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and other attributes that are tensors, under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for name, _, _, tensor in attributes_of(model):
        yield name, tensor


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode, and each one's own mode back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@dataclass(frozen=True)
class _Entering(Mark):
    stack: list[str]
    name: str

    def __call__(self, *_: Any) -> None:
        self.stack.append(self.name)


@dataclass(frozen=True)
class _Leaving(Mark):
    stack: list[str]

    def __call__(self, *_: Any) -> None:
        self.stack.pop()


@contextmanager
def tracking_modules(module: nn.Module) -> Iterator[Callable[[], str]]:
    """Yields a function that names the submodule whose forward was entered last and not left."""
    names = {part: name for name, part in module.named_modules()}
    stack: list[str] = []
    hooks = []
    for part, name in names.items():
        hooks.append(part.register_forward_pre_hook(_Entering(stack, name)))
        hooks.append(part.register_forward_hook(_Leaving(stack)))
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for hook in hooks:
            hook.remove()


def _widened(model: nn.Module, precision: Precision | None) -> set[int]:
    """Ids of the tensors that are kept in fp32 though the model has them in a reduced dtype.

    Computing in fp32 widens all. Otherwise trainable parameters become fp32 masters, and buffers
    beside them (a batch norm's) go with them; so do vectors, as norms want theirs in the dtype of
    what they normalise. Frozen matrices stay as small as they came. Where parameters are cast, the
    masters alone do, and all that modules have that stay in fp32.
    """
    if precision is None:
        return set()
    if precision.narrows is not None:
        islands = islands_of(model_of(model), precision).values()
        inner = (t for part in islands for t in (*part.parameters(), *part.buffers()))
        trained = (p for p in model.parameters() if p.requires_grad)
        return {id(t) for t in (*inner, *trained) if t.dtype in REDUCED}
    found: set[int] = set()
    for part in model.modules():
        params = [p for p in part.parameters(recurse=False) if p.dtype in REDUCED]
        buffers = [b for b in part.buffers(recurse=False) if b.dtype in REDUCED]
        wide = [p for p in params if p.requires_grad or p.dim() < 2 or not precision.casts]
        found |= {id(t) for t in (*wide, *(buffers if wide else ()))}
    return found


def _fake_like(
    tensor: torch.Tensor,
    mode: FakeTensorMode,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> torch.Tensor:
    trained = tensor.requires_grad and training
    as_it_is = (tensor.device, tensor.dtype, tensor.requires_grad) == (device, dtype, trained)
    if isinstance(tensor, FakeTensor) and as_it_is:
        return tensor
    with mode:
        fake: torch.Tensor = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=dtype, device=device
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=trained)
    return fake


def _check_hooks(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
            raise CaptureError(
                f"parameter {name!r} has a gradient hook, which a compiled backward would not "
                "run: remove it, and change .grad between forward_backward() and the step"
            )
    for name, part in model.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            raise CaptureError(
                f"module {name or '(the model itself)'!r} has a backward hook, which a compiled "
                "backward would not run: remove it, or write it as a torch.autograd.Function"
            )


def _in_parameters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The tensors that lie in the memory of a parameter -> its name."""
    owners = {memory: n for n, p in model.named_parameters() if (memory := memory_of(p))}
    memories = {name: memory_of(tensor) for name, tensor in tensors.items()}
    return {name: owners[memory] for name, memory in memories.items() if memory in owners}


def _check_storage(model: nn.Module) -> None:
    spans: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
    for name, param in model.named_parameters():
        memory = memory_of(param)
        if memory is None:
            continue
        start = int(param.storage_offset()) * param.element_size()
        end = start + extent(param) * param.element_size()
        spans.setdefault(memory, []).append((start, end, name))
    for group in spans.values():
        group.sort()
        for (_, end, first), (start, _, second) in pairwise(group):
            if start < end:
                raise SharedStorageError(
                    f"parameters {first!r} and {second!r} overlap in memory but are two tensors, "
                    "so neither a tied nor a separate weight describes them: tie them by "
                    f"assigning one Parameter to both names, or clone one of them"
                )
