"""Averages of the weights over steps, such as an exponential one, and runs with them in place.

An `torch.optim.Optimizer` by its form alone: checkpoints keep the states of one by the names of the
parameters, and open them under any stages and replicas, which is what averages need too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...compiler.ir.errors import OptionError, StateError

Tensors = Sequence[torch.Tensor]
AverageAll = Callable[[Any, Any, Any], object]
"""(averages, parameters, count): changes the averages in place, as torch's ``multi_avg_fn``."""
AverageOne = Callable[[torch.Tensor, torch.Tensor, Any], Any]
"""(average, parameter, count) -> the next average, as torch's ``avg_fn``."""
Guard = Callable[[str], contextlib.AbstractContextManager[None]]
_AVERAGE, _COUNT = "average", "averaged"


class AveragedWeights(torch.optim.Optimizer):
    """What `torch.optim.swa_utils.AveragedModel` has, of the parameters of a process; made by
    `Pipeline.averaged`.

    Args:
        params: that are trained here.
        average: all averages at once.
        guard: around a call of the pipeline's.
        check_weights: raises StateError where averages are in their place, and a call needs them.
        placed: told whether averages are in the place of the weights.

    Raises:
        OptionError: ``average`` does not treat every element alone.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        average: AverageAll,
        guard: Guard,
        check_weights: Callable[[str], None],
        placed: Callable[[bool], None],
    ):
        _check(average)
        super().__init__([{"params": list(params) or [nn.Parameter(torch.empty(0))]}], {_COUNT: 0})
        self._average, self._guard = average, guard
        self._check_weights, self._placed = check_weights, placed

    @property
    def n_averaged(self) -> int:
        """How often `update` was called."""
        count: int = self.param_groups[0][_COUNT]
        return count

    def step(self, closure: Any = None) -> Any:
        """Not an optimizer's: see `update`."""
        raise OptionError("the averages of weights have no step(): call update() after a step")

    def load_state_dict(self, state_dict: Any) -> None:
        """As every optimizer's.

        Raises:
            StateError: the number of updates is none.
        """
        for group in state_dict["param_groups"]:
            if type(count := group.get(_COUNT)) is not int or not 0 <= count < 2**63:
                raise StateError(f"the averages of weights were updated {count!r} times")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average; the first are the average. Nothing is
        exchanged.

        Raises:
            StateError: the averages are in the place of the weights.
        """
        self._check_weights("update()")
        with self._guard("update() of averaged()"):
            params = self._params()
            if not self.n_averaged:
                for param in params:
                    self.state[param][_AVERAGE] = param.detach().clone()
            for alike in _by_kind(params if self.n_averaged else []):
                averages = [self.state[param][_AVERAGE] for param in alike]
                count = torch.tensor(self.n_averaged, device=alike[0].device)
                self._average(averages, [param.detach() for param in alike], count)
            self.param_groups[0][_COUNT] += 1

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, `evaluate`, `forward`, `state_dict` and `load_into` have the averages.

        They change places with the weights, without further memory but for one tensor.

        Raises:
            StateError: there are none yet, or it is entered twice.
        """
        if not self.n_averaged:
            raise StateError("there is no average of the weights before the first update()")
        self._check_weights("another swapped()")
        with self._guard("swapped()"):
            self._swap(True)
        try:
            yield
        finally:
            with self._guard("the end of swapped()"):
                self._swap(False)

    @torch.no_grad()
    def _swap(self, there: bool) -> None:
        for param in self._params():
            average = self.state[param][_AVERAGE]
            before = param.detach().clone()
            param.copy_(average)
            average.copy_(before)
        self._placed(there)

    def _params(self) -> list[nn.Parameter]:
        return [param for param in self.param_groups[0]["params"] if param.numel()]


def average_of(multi_avg_fn: AverageAll | None, avg_fn: AverageOne | None) -> AverageAll:
    """Of what `AveragedModel` takes; the plain mean of all updates where nothing is given.

    Raises:
        OptionError: both are given, or something that cannot be called.
    """
    for name, value in (("multi_avg_fn", multi_avg_fn), ("avg_fn", avg_fn)):
        if value is not None and not callable(value):
            raise OptionError(
                f"{name}={value!r} is not callable: give a function such as those of "
                "torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)"
            )
    if multi_avg_fn is not None:
        if avg_fn is not None:
            raise OptionError("avg_fn= has no effect beside multi_avg_fn=: leave one of them out")
        return multi_avg_fn
    one: AverageOne = avg_fn or _mean

    def each(averages: Tensors, params: Tensors, count: torch.Tensor) -> None:
        for average, param in zip(averages, params, strict=True):
            average.copy_(one(average, param, count))

    return each


def _mean(average: torch.Tensor, param: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """As torch's `get_swa_avg_fn` has it."""
    return average + (param - average) / (count + 1)


def _by_kind(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    found: dict[Any, list[nn.Parameter]] = {}
    for param in params:
        found.setdefault((param.device, param.dtype), []).append(param)
    return list(found.values())


def _check(average: AverageAll) -> None:
    """A process has some parameters only, and rows of them: an average must not tell."""
    generator = torch.Generator().manual_seed(0)
    first, second, new, other = torch.rand((4, 6, 4), generator=generator, dtype=torch.float64)
    count = torch.tensor(1)
    together = [first.clone(), second.clone()]
    average(together, [new, other], count)
    alone = first.clone()
    average([alone], [new], count)
    rows = first.clone()
    average([rows[:2]], [new[:2]], count)
    average([rows[2:]], [new[2:]], count)
    if not torch.allclose(alone, together[0]) or not torch.allclose(rows, alone):
        raise OptionError(
            "multi_avg_fn= or avg_fn= gives an element another average where it has other elements "
            "beside it, and a process has some of them only: average each element alone"
        )
