"""Which submodules of a model run eagerly, and their calls while the model is traced."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..ir.errors import CaptureError, OptionError, RegionError
from ..tensors.pytree import tree_flatten
from .operators import run
from .site import Site, enter
from .trial import is_cache, tried

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class Regions:
    """The submodules of one model that run eagerly.

    Args:
        module: the model's weightless copy.
        asked: names of submodules that the user wants to run so; ``*`` for any layer's number.

    Attributes:
        why: submodule -> why it runs eagerly.
        sites: calls that graphs have, by key.
    """

    def __init__(self, module: nn.Module, asked: Iterable[str] = ()):
        self._parts = dict(module.named_modules())
        self._asked = tuple(asked)
        self.why: dict[str, str] = {}
        self._cacheless: list[Any] = []
        self.sites: dict[str, Site] = {}

    def find(self) -> None:
        """Take what the user has asked for; ranks have compared it before.

        Raises:
            OptionError: a name that no submodule has.
        """
        names = [name for name in self._parts if name]
        for pattern in self._asked:
            found = [name for name in names if _matches(pattern, name)]
            if not found:
                few = ", ".join(map(repr, names[:6])) or "none"
                raise OptionError(
                    f"eager_modules: {pattern!r} stands for no submodule of the model, which has "
                    + (f"{few} and more" if len(names) > 6 else few)
                )
            self._add(dict.fromkeys(found, "eager_modules asks for it"))
        self._asked = ()

    def extend(self, error: Exception | None) -> bool:
        """Add the submodule that an error is about, or one around it, with those of other layers
        that are like it; False where there is none but the model itself.

        A cache that a submodule is given is of no use in training, and goes first.
        """
        if isinstance(error, RegionError) and error.cache and not self._cacheless:
            configs = [getattr(part, "config", None) for part in self._parts.values()]
            self._cacheless = [each for each in configs if getattr(each, "use_cache", False)]
            self._use_cache(False)
            if self._cacheless:
                return True
        name = (error.module if isinstance(error, CaptureError) else None) or ""
        tried = [outer for outer in self.why if f"{name}.".startswith(f"{outer}.")]
        if tried:  # in vain: it cannot run so, or its other methods are called
            name = min(tried, key=len).rpartition(".")[0]
        while name and (name not in self._parts or not _has_forward(self._parts[name])):
            name = name.rpartition(".")[0]
        if not name:
            return False
        kind = type(self._parts[name])
        alike = [
            other
            for other, part in self._parts.items()
            if type(part) is kind and _pattern(other) == _pattern(name)
        ]
        self._add(dict.fromkeys(alike, str(error)))
        return True

    def restore(self, why: dict[str, str]) -> None:
        """As before `extend`."""
        self.why = why
        self._use_cache(True)
        self._cacheless = []

    @property
    def cacheless(self) -> bool:
        """Whether the copy's configuration says ``use_cache=False`` and the model's does not."""
        return bool(self._cacheless)

    def _use_cache(self, use: bool) -> None:
        for config in self._cacheless:
            config.use_cache = use

    def _add(self, why: dict[str, str]) -> None:
        self.why |= why
        inner = [n for n in self.why if any(n.startswith(f"{outer}.") for outer in self.why)]
        for name in inner:
            del self.why[name]

    @property
    def patterns(self) -> dict[str, str]:
        """The names with ``*`` for numbers of layers -> why."""
        return {_pattern(name): why for name, why in self.why.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a plan says of them."""
        counts = Counter(map(_pattern, self.why))
        return tuple(
            f"{pattern} runs eagerly, each call as one node ({count} of them)"
            for pattern, count in counts.items()
        )

    @property
    def drawing(self) -> frozenset[str]:
        """Submodules of which calls draw random numbers."""
        tried = [(site.path, site.facts) for site in self.sites.values()]
        return frozenset(path for path, facts in tried if facts is not None and facts.draws)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """A trace inside."""
        parts = [(name, self._parts[name]) for name in self.why]
        for name, part in parts:
            part.forward = _Traced(self, name, part)
        try:
            yield
        finally:
            for _, part in parts:
                del part.forward

    def site(self, name: str, part: nn.Module, args: Any, kwargs: Any) -> tuple[Site, list[Any]]:
        """A call that is being traced, and its operands.

        Raises:
            RegionError: it cannot be a node.
        """
        operands: dict[int, torch.Tensor] = {}
        named = (*part.named_parameters(), *part.named_buffers())
        state = {id(tensor): path for path, tensor in reversed(named)}
        for _, tensor in named:
            operands[id(tensor)] = tensor
        flat, tree = tree_flatten((args, kwargs))
        places: dict[int, list[int]] = {}
        constants = {}
        for i, leaf in enumerate(flat):
            if isinstance(leaf, torch.Tensor):
                operands.setdefault(id(leaf), leaf)
                places.setdefault(id(leaf), []).append(i)
            elif type(leaf) in _PLAIN:
                constants[i] = leaf
            else:
                raise RegionError(
                    f"module {name!r} cannot run eagerly inside a graph: it is given a "
                    f"{type(leaf).__name__}",
                    name,
                    cache=is_cache(leaf),
                )
        needs = torch.is_grad_enabled()
        kinds = {tensor.device.type for tensor in operands.values()}
        site = Site(
            part,
            name,
            tuple(state[key] for key in operands if key in state),
            tuple(tuple(places[key]) for key in operands if key not in state),
            constants,
            tree,
            tuple(needs and tensor.requires_grad for tensor in operands.values()),
            {k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)},
            {each: each.training for each in part.modules()},
        )
        return site, list(operands.values())


class _Traced:
    """Stands for a submodule's forward while the model is traced."""

    def __init__(self, regions: Regions, name: str, part: nn.Module):
        self._regions, self._name, self._part = regions, name, part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        regions, part = self._regions, self._part
        site, operands = regions.site(self._name, part, args, kwargs)
        site = enter(site, operands, regions.sites)
        if site.facts is None:
            with _untraced(part):
                site.facts = tried(site, operands)
        results = run(site, operands)
        facts = site.facts
        count = len(facts.differentiable)
        with torch.no_grad():
            for i, value in zip(facts.updated, results[count:], strict=True):
                operands[i].copy_(value)
        return facts.rebuild(results[:count])


@contextlib.contextmanager
def _untraced(part: nn.Module) -> Iterator[None]:
    """The submodule's own forward, to be run."""
    traced = vars(part).pop("forward")
    try:
        yield
    finally:
        vars(part)["forward"] = traced


def _has_forward(part: nn.Module) -> bool:
    return type(part).forward is not nn.Module.forward


def _pattern(name: str) -> str:
    """With the numbers of layers left open."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None
