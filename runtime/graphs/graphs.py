"""The recorded programs of one rank, one for each that may be in flight at once.

A microbatch in flight has a slot of its stage: memory that holds all that the microbatch's programs
read and leave there, always in the same place. Each program is recorded once per slot, so what F
leaves for B is read where it was made, and only what comes from elsewhere (the batch, messages, the
tangent) is copied in. What leaves the stage is copied out (`copied`), as the slot may be used again
before it has left. The first run is not recorded: it warms up.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...compiler.ir import ops
from ...compiler.ir.actions import Action, Kind, slots_of
from ...compiler.ir.program import Program, Role
from .recorder import Recorder, Recording, Values

Inputs = Sequence[tuple[int, Hashable]]
"""Positions of the arguments that differ between microbatches, each with the name of its value."""


@dataclass
class _Slot:
    """Attributes:
    homes: name of a value -> where it is read.
    programs: what was recorded, and its results.
    holds: the microbatch, with the number of the run, and what of it is in its home.
    """

    homes: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    programs: dict[Kind, tuple[Recording, Values]] = field(default_factory=dict)
    holds: tuple[int, int] = (0, -1)
    there: set[Hashable] = field(default_factory=set)


class Graphs:
    """Args:
    actions: of the rank, which say what is in flight at once.
    """

    def __init__(self, recorder: Recorder, actions: Sequence[Action]):
        self._recorder, self._runs = recorder, 0
        self._lies: tuple[int, ...] = ()
        stages = {action.stage for action in actions}
        self._numbers = {stage: slots_of(actions, stage) for stage in stages}
        self._slots: dict[tuple[int, int], _Slot] = {}

    @property
    def recording(self) -> bool:
        """Whether programs are replayed in this run."""
        return self._runs > 1

    def begin(self, lies: tuple[int, ...]) -> None:
        """A run begins.

        Args:
            lies: addresses of all that programs are bound to. Where one has changed everything is
                recorded anew.
        """
        self._runs += 1
        if lies != self._lies:
            self._slots.clear()
        self._lies = lies

    def compute(
        self, action: Action, program: Program, arguments: list[Any], inputs: Inputs, seed: int
    ) -> Values:
        """Run a program, recorded or replayed.

        Args:
            arguments: those at the positions of ``inputs`` are replaced by their homes.
            seed: of its random operators, if it has any.
        """
        assert action.microbatch is not None
        slot = self._slot(action.stage, action.microbatch)
        for position, name in inputs:
            arguments[position] = _at_home(slot, name, arguments[position])
        known = slot.programs.get(action.kind)
        if known is not None:
            known[0].replay(seed)
            return known[1]
        known = self._record(program, arguments, seed)
        slot.programs[action.kind] = known
        made = zip(program.outputs, known[1], strict=True)
        slot.homes |= {port.key: value for port, value in made if port.role is Role.VALUE}
        return known[1]

    def _slot(self, stage: int, index: int) -> _Slot:
        slot = self._slots.setdefault((stage, self._numbers[stage][index]), _Slot())
        if slot.holds != (self._runs, index):
            slot.holds = self._runs, index
            slot.there.clear()
        return slot

    def _record(
        self, program: Program, arguments: list[Any], seed: int
    ) -> tuple[Recording, Values]:
        seeds = [i for i, each in enumerate(program.inputs) if each.role is Role.SEED]
        forward = program.module.forward

        def run(draw: ops.Draw) -> Values:
            given = arguments.copy()  # which the program empties
            for position in seeds:
                given[position] = draw
            made: Values = forward(given)
            return made

        draws = program.module.graph.find_nodes(op="call_function", target=ops.seeded)
        try:
            return self._recorder.record(run, seed, len(draws))
        except RuntimeError as error:
            error.add_note("while it was recorded: cudagraphs=False runs it operator by operator")
            raise


def _at_home(slot: _Slot, name: Hashable, given: torch.Tensor) -> torch.Tensor:
    """A value where programs read it; it is copied there if it comes from elsewhere."""
    home = slot.homes.get(name)
    if home is None:
        home = slot.homes[name] = copied(given)
    elif home is not given and name not in slot.there:
        home.copy_(given)
    slot.there.add(name)
    return home


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides in memory of their own, also where elements are repeated."""
    distinct = tensor
    for dim, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[dim] > 1:
            distinct = distinct.narrow(dim, 0, 1)
    return distinct.clone().expand(tensor.shape)


def addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
