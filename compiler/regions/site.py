"""One call of a submodule, run eagerly with autograd: its results, and gradients later.

A program is handed a *ticket* between the two: a tensor that takes no memory of its own, claims the
bytes that autograd has saved, and holds them for as long as it lives itself. What a backward needs
of the call's own operands is not held: it is taken from those that backward is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.func import functional_call

from ..ir.errors import StateError
from ..ir.region import Work, is_not_reached, mark_not_reached
from ..tensors.facts import extent
from ..tensors.pytree import TreeSpec, tree_flatten, tree_unflatten

Tensors = Sequence[torch.Tensor]
Optionals = Sequence[torch.Tensor | None]


_PLAIN = (bool, int, float, complex, str, torch.dtype)


@dataclass
class Facts:
    """What a trial has shown of a call.

    Attributes:
        outputs: tensors that it returns, on the meta device; then the updated buffers.
        tree: the structure of what it returns, ``others`` in the places that have no tensor.
        differentiable: of each tensor in it, whether gradients flow through it.
        updated: positions of buffers among the operands that it changes, or replaces.
        kept: positions of operands that a backward reads.
        gradients: of the operands that need one, on the meta device.
        saved_bytes: what autograd saves besides these.
        draws: whether it draws random numbers from torch.
    """

    outputs: tuple[torch.Tensor, ...]
    tree: TreeSpec
    others: dict[int, Any]
    differentiable: tuple[bool, ...]
    updated: tuple[int, ...]
    kept: tuple[int, ...]
    gradients: tuple[torch.Tensor, ...]
    saved_bytes: int
    draws: bool
    forward: Work
    backward: Work

    def rebuild(self, tensors: Tensors) -> Any:
        """What the module returned, with these tensors."""
        rest = iter(tensors)
        size = self.tree.num_leaves
        leaves = [self.others[i] if i in self.others else next(rest) for i in range(size)]
        return tree_unflatten(leaves, self.tree)


@dataclass(eq=False)
class Site:
    """A call.

    Attributes:
        module: the submodule, without weights.
        path: its name in the model.
        state: names of its parameters and buffers, which are the first operands.
        places: where the other operands are among the leaves of the arguments.
        constants: the leaves that are no tensors, by their position.
        tree: the structure of the arguments.
        needs: of each operand, whether it gets a gradient.
        regions: autocast, by kind of device.
        modes: submodules -> whether they are in training mode.
    """

    module: nn.Module
    path: str
    state: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    constants: dict[int, Any]
    tree: TreeSpec
    needs: tuple[bool, ...]
    regions: dict[str, torch.dtype]
    modes: dict[nn.Module, bool]
    key: str = ""
    facts: Facts | None = None
    told: bool = False  # that a call has passed on no gradient

    @property
    def trains(self) -> bool:
        return any(self.needs)

    @property
    def known(self) -> Facts:
        assert self.facts is not None
        return self.facts

    def digest(self, operands: Tensors) -> str:
        """Equal for calls that are alike, on every rank."""
        text = hashlib.sha256()
        for name, part in self.module.named_modules():
            plain = [(key, x) for key, x in vars(part).items() if isinstance(x, _PLAIN)]
            kind = type(part).__qualname__
            text.update(repr((name, kind, self.modes[part], sorted(plain))).encode())
        text.update(repr((self.state, self.places, str(self.tree))).encode())
        text.update(repr((sorted(self.constants.items()), self.needs, self.regions)).encode())
        described = [(tuple(t.shape), t.stride(), str(t.dtype)) for t in operands]
        text.update(repr(described).encode())
        return text.hexdigest()[:12]

    # -- running ------------------------------------------------------------------------------

    def forward(self, operands: Tensors) -> list[torch.Tensor]:
        """Outputs, updated buffers and, where it trains, the ticket."""
        run = self.run(operands)
        self._check(run)
        given = {t.untyped_storage().data_ptr() for t in operands if t.numel()}
        given |= run.saved.packing.storages
        results = [_apart(output, given) for output in run.outputs]
        results += [_apart(run.changed[i], given) for i in self.known.updated]
        if self.trains:
            results.append(self._ticket(run))
        return results

    def run(self, operands: Tensors) -> Run:
        """The call, with autograd where an operand needs a gradient."""
        packing = Packing(operands, None if self.facts is None else self.facts.kept)
        leaves = [
            tensor.detach().requires_grad_(needs)
            for tensor, needs in zip(operands, self.needs, strict=True)
        ]
        for i in self.known.updated if self.facts is not None else ():
            leaves[i] = leaves[i].clone()
        count = len(self.state)
        state = dict(zip(self.state, leaves[:count], strict=True))
        args, kwargs = self._arguments(leaves[count:])
        versions = [leaf._version for leaf in leaves]
        hooks: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.trains:
            hooks = saved_tensors_hooks(packing.pack, packing.unpack)
        with self._as_it_was(), torch.set_grad_enabled(self.trains), hooks:
            output = functional_call(self.module, state, args, kwargs)  # state is as it leaves it
        after = [*state.values(), *leaves[count:]]
        changed = [
            i
            for i, (leaf, left) in enumerate(zip(leaves, after, strict=True))
            if left is not leaf or leaf._version != versions[i]
        ]
        flat, tree = tree_flatten(output)
        outputs = tuple(leaf for leaf in flat if isinstance(leaf, torch.Tensor))
        others = {i: leaf for i, leaf in enumerate(flat) if not isinstance(leaf, torch.Tensor)}
        updated = {i: after[i].detach() for i in changed}
        differentiable = tuple(output.requires_grad for output in outputs)
        plain = tuple(output.detach() for output in outputs)  # one may be a leaf
        needed = [leaf for leaf, needs in zip(leaves, self.needs, strict=True) if needs]
        saved = Saved(packing, outputs, needed)
        return Run(plain, differentiable, others, tree, updated, saved)

    def backward(
        self, kept: Tensors, ticket: torch.Tensor, grads: Optionals, carried: Optionals
    ) -> list[torch.Tensor]:
        """Gradients of the operands that need them, added to what is carried; zeros, and marked,
        where there is none."""
        saved = getattr(ticket, _SAVED, None)
        if not isinstance(saved, Saved):
            raise StateError(
                f"module {self.path!r}, which runs eagerly, has no saved values for its backward"
            )
        found = saved.gradients(dict(zip(self.known.kept, kept, strict=True)), grads, carried)
        of_arguments = found[sum(self.needs[: len(self.state)]) :]
        if any(map(is_not_reached, of_arguments)) and not self.told:
            self.told = True
            warnings.warn(
                f"module {self.path!r}, which runs eagerly, passes no gradient to what was "
                "computed before it: parameters that have no other get zeros, where one device "
                "leaves .grad None, and weight decay or momentum move them in this step",
                stacklevel=2,
            )
        return found

    def _arguments(self, tensors: Tensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves: list[Any] = [self.constants.get(i) for i in range(self.tree.num_leaves)]
        for places, tensor in zip(self.places, tensors, strict=True):
            for place in places:
                leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.tree)
        return args, kwargs

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """In the modes, and under the autocast, of the time when it was traced."""
        before = {part: part.training for part in self.modes}
        with contextlib.ExitStack() as stack:
            for kind, dtype in self.regions.items():
                stack.enter_context(torch.autocast(kind, dtype))
            try:
                for part, training in self.modes.items():
                    part.training = training
                yield
            finally:
                for part, training in before.items():
                    part.training = training

    def _check(self, run: Run) -> None:
        outputs = run.outputs
        expected = self.known.outputs[: len(self.known.outputs) - len(self.known.updated)]
        shapes = [tuple(t.shape) for t in outputs]
        if shapes != [tuple(t.shape) for t in expected] or any(
            a.dtype is not b.dtype for a, b in zip(outputs, expected, strict=True)
        ):
            raise StateError(
                f"module {self.path!r}, which runs eagerly, returned {shapes}, and "
                f"{[tuple(t.shape) for t in expected]} when it was tried: the shapes of its "
                "results must not depend on data"
            )
        if set(run.changed) != set(self.known.updated):
            odd = min(set(run.changed) ^ set(self.known.updated))
            name = self.state[odd] if odd < len(self.state) else "an argument"
            raise StateError(
                f"module {self.path!r}, which runs eagerly, changes {name!r} in some calls and not "
                "in others: change it in all, also where it keeps its value"
            )

    def _ticket(self, run: Run) -> torch.Tensor:
        device = next((t.device for t in run.outputs), torch.device("cpu"))
        ticket = torch.empty(1, dtype=torch.uint8, device=device).expand(self.known.saved_bytes)
        setattr(ticket, _SAVED, run.saved)
        return ticket


_SAVED = "_pipecompile_saved"


@dataclass
class Run:
    """What a call has made.

    Attributes:
        changed: operands that it has changed, or given other tensors, as it left them.
    """

    outputs: tuple[torch.Tensor, ...]
    differentiable: tuple[bool, ...]
    others: dict[int, Any]
    tree: TreeSpec
    changed: dict[int, torch.Tensor]
    saved: Saved


@dataclass(frozen=True)
class _Packed:
    """A saved tensor that lies in the memory of an operand."""

    operand: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Packing:
    """What autograd saves, apart from the operands that backward is given.

    It knows nothing of the graph that holds it: what held itself would never be let go.

    Attributes:
        given: the operands of a backward that is running, by their position.
        kept: positions of operands that a backward reads.
        storages: of what was saved and is no operand's, by address.
        saved_bytes: of these.
    """

    def __init__(self, operands: Tensors, expected: Collection[int] | None):
        self._expected = expected
        # addresses, not tensors: an operand is not to live longer for this
        self._spans = [_span(tensor) for tensor in operands]
        self._offsets = [int(tensor.storage_offset()) for tensor in operands]
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in operands}
        self.given: dict[int, torch.Tensor] = {}
        self.kept: set[int] = set()
        self.storages: set[int] = set()
        self.saved_bytes = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if not tensor.numel() or storage.data_ptr() not in self._storages:
            if storage.data_ptr() not in self.storages:
                self.storages.add(storage.data_ptr())
                self.saved_bytes += storage.nbytes()
            return tensor.detach()
        begin, end = _span(tensor)
        for i, (first, last) in enumerate(self._spans):
            if first <= begin and end <= last and (self._expected is None or i in self._expected):
                self.kept.add(i)
                offset = int(tensor.storage_offset()) - self._offsets[i]
                return _Packed(i, tensor.shape, tensor.stride(), offset)
        return tensor.detach().clone()  # backward is not given it, and others may write over it

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        given = self.given[packed.operand]
        offset = given.storage_offset() + packed.offset
        return given.detach().as_strided(packed.shape, packed.stride, offset)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of that after its last."""
    if not tensor.numel():
        return 0, -1
    return tensor.data_ptr(), tensor.data_ptr() + extent(tensor) * tensor.element_size()


class Saved:
    """One call's graph, without the memory of its operands and outputs.

    Args:
        leaves: the operands that get gradients; their memory is let go.
    """

    def __init__(self, packing: Packing, outputs: Tensors, leaves: Tensors):
        self.packing = packing
        self._edges = [get_gradient_edge(t) if t.requires_grad else None for t in outputs]
        self._leaves = leaves
        for leaf in leaves:
            leaf.data = leaf.new_empty(()).expand(leaf.shape)

    def gradients(
        self, kept: dict[int, torch.Tensor], grads: Optionals, carried: Optionals
    ) -> list[torch.Tensor]:
        """Of the leaves.

        Args:
            kept: operands, by their position.
            grads: of the outputs; None for zero.
            carried: of the leaves, what was added up before.
        """
        pairs = [
            (edge, grad)
            for edge, grad in zip(self._edges, grads, strict=True)
            if grad is not None and edge is not None and not is_not_reached(grad)
        ]
        with torch.enable_grad():  # of what is made last autograd makes the gradients first
            pairs += [
                (get_gradient_edge(leaf.view_as(leaf)), before)
                for leaf, before in zip(self._leaves, carried, strict=True)
                if before is not None and not is_not_reached(before)
            ]
        if not pairs:
            return [_not_reached(leaf) for leaf in self._leaves]
        self.packing.given = kept
        try:
            found = torch.autograd.grad(
                [edge for edge, _ in pairs],
                self._leaves,
                [grad for _, grad in pairs],
                retain_graph=True,  # it goes with the ticket
                allow_unused=True,
            )
        finally:
            self.packing.given = {}
        taken = {t.untyped_storage().data_ptr() for t in (*kept.values(), *(g for _, g in pairs))}
        taken |= self.packing.storages
        results = []
        for leaf, grad in zip(self._leaves, found, strict=True):
            results.append(_not_reached(leaf) if grad is None else _apart(grad, taken))
            taken.add(results[-1].untyped_storage().data_ptr())
        return results


def _not_reached(leaf: torch.Tensor) -> torch.Tensor:
    return mark_not_reached(leaf.new_zeros(()).expand(leaf.shape))


def _apart(tensor: torch.Tensor, taken: Collection[int]) -> torch.Tensor:
    """In memory of its own: what an operator returns is no view of anything else."""
    if tensor.numel() and tensor.untyped_storage().data_ptr() in taken:
        return tensor.clone()
    return tensor


_sites: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()


def site_of(key: str) -> Site:
    """The call that an operator of a graph stands for."""
    return _sites[key]


def enter(site: Site, operands: Tensors, mine: dict[str, Site]) -> Site:
    """Give a call its key: the same on every rank, and no other model's in this process.

    Args:
        mine: the calls of this model so far, by key.

    Returns:
        The call of this model that it repeats, or itself.
    """
    base = f"{site.path or 'the model'}#{site.digest(operands)}"
    number = 0
    while True:
        key = base if not number else f"{base}~{number}~"
        if key in mine and mine[key].module is site.module:
            return mine[key]
        if key not in _sites:
            break
        number += 1
    site.key = key
    _sites[key] = mine[key] = site
    return site
