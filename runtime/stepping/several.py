"""Several optimizers as one: each parameter goes to the first whose rule takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ...compiler.ir.errors import OptionError
from ...compiler.options.checks import check_optimizer
from ...compiler.profiling.standins import Factory, called, or_nothing

Rule = str | Callable[[str, torch.Tensor], bool]
"""A pattern of names, in which * stands for anything, or a function of (name, parameter)."""


class Several:
    """What ``optimizer=`` takes to step some parameters by one optimizer and some by another.

        optimizer=pipecompile.Several(
            ("*embed*", partial(torch.optim.Adam, lr=1e-3)),
            (lambda name, p: p.dim() == 2, partial(Muon, lr=0.02)),
            ("*", partial(torch.optim.AdamW, lr=3e-4)),
        )

    Rules may tell by names and shapes alone: a process has some of the parameters, and maybe rows.

    Args:
        parts: (rule, factory) each, in the order in which they are asked.

    Raises:
        OptionError: one is no such pair.
    """

    def __init__(self, *parts: tuple[Rule, Factory]):
        for part in parts:
            if not isinstance(part, tuple) or len(part) != 2:
                raise OptionError(f"Several() was given {part!r}: give pairs (rule, factory)")
            rule, factory = part
            if not isinstance(rule, str) and not callable(rule):
                raise OptionError(
                    f'Several() has the rule {rule!r}: give a pattern such as "*.weight", or a '
                    "function of (name, parameter)"
                )
            check_optimizer("the factory in Several()", factory)
        if not parts:
            raise OptionError('Several() was given nothing: give pairs such as ("*", factory)')
        self._parts = parts

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> OptimizersAsOne:
        """The optimizer of these parameters.

        Raises:
            OptionError: no rule takes one of them.
        """
        given: list[list[tuple[str, nn.Parameter]]] = [[] for _ in self._parts]
        for name, param in named:
            given[self._part_of(name, param)].append((name, param))
        made = []
        for (_, factory), mine in zip(self._parts, given, strict=True):
            made.append(called(factory, or_nothing(mine)))
        return OptimizersAsOne(made)

    def _part_of(self, name: str, param: nn.Parameter) -> int:
        for number, (rule, _) in enumerate(self._parts):
            if fnmatchcase(name, rule) if isinstance(rule, str) else rule(name, param):
                return number
        if not param.numel():  # of a process without any
            return 0
        raise OptionError(
            f'no rule of Several() takes {name!r}, which would not be trained: end with ("*", '
            "factory), or freeze it"
        )


class OptimizersAsOne(torch.optim.Optimizer):
    """Steps one after the other; its groups and states are theirs.

    Attributes:
        optimizers: in the order of the rules, on every process as many.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        super().__init__([nn.Parameter(torch.empty(0))], {})
        self.optimizers = list(optimizers)
        self.state: Any = _States(self.optimizers)
        self.join()

    def join(self) -> None:
        """Show the groups that the optimizers have now."""
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step all of them."""
        if closure is not None:
            raise OptionError("several optimizers that step as one take no closure")
        for each in self.optimizers:
            each.step()

    def train(self) -> None:
        """Of those that have two modes, as schedule-free ones."""
        self._tell("train")

    def eval(self) -> None:
        """Of those that have two modes, as schedule-free ones."""
        self._tell("eval")

    def _tell(self, mode: str) -> None:
        for each in self.optimizers:
            if callable(switch := getattr(each, mode, None)):
                switch()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` of such optimizers returned."""
        rest = iter(state_dict["param_groups"])
        for each in self.optimizers:
            groups = [next(rest) for _ in each.param_groups]
            numbers = {number for group in groups for number in group["params"]}
            state = {n: found for n, found in state_dict["state"].items() if n in numbers}
            each.load_state_dict({"state": state, "param_groups": groups})
        self.join()


class _States(MutableMapping[torch.Tensor, dict[str, Any]]):
    """Parameter -> its state, in the optimizer that has it."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self._optimizers = optimizers

    def _of(self, param: Any) -> Any:
        for each in self._optimizers:
            for group in each.param_groups:
                if any(param is one for one in group["params"]):
                    return each.state
        raise KeyError(param)

    def __getitem__(self, param: torch.Tensor) -> dict[str, Any]:
        found: dict[str, Any] = self._of(param)[param]
        return found

    def __setitem__(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        self._of(param)[param] = state

    def __delitem__(self, param: torch.Tensor) -> None:
        del self._of(param)[param]

    def __contains__(self, param: object) -> bool:
        return any(param in each.state for each in self._optimizers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (param for each in self._optimizers for param in each.state)

    def __len__(self) -> int:
        return sum(len(each.state) for each in self._optimizers)
