"""ZeRO: what the replicas of a stage divide among themselves.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020.

======  ======  =========  ==========  =========================================================
level   states  gradients  parameters  so that
======  ======  =========  ==========  =========================================================
0       whole   whole      whole       gradients are averaged once per step, everywhere
1       rows    whole      whole       gradients leave with the last microbatch, each to its owner
2       rows    rows       whole       gradients leave with every microbatch
3       rows    rows       rows        programs fetch parameters before they read them
======  ======  =========  ==========  =========================================================

At levels 1 and 2 the rows of the parameters are made whole once per step, before the first program.

An optimizer that needs whole parameters gets some of them whole instead of rows of each: of what is
trained one replica has all rows, and the others none (`owners_of`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from .program import PipelineProgram

Owners = Mapping[str, int]
"""FQN -> the replica that owns all of it. Parameters that are not named are divided by rows."""


@dataclass(frozen=True)
class Zero:
    """One level, and what follows from it.

    Attributes:
        divides_states: a replica's optimizer steps its own rows alone; weights of which only a
            copy in another dtype is read are kept as rows, too.
        matrices: what is trained has one owner, with all rows of it.
    """

    level: int
    divides_states: bool = False
    divides_grads: bool = False
    divides_params: bool = False
    matrices: bool = False

    @property
    def by(self) -> str:
        """How, as `CompileOptions.zero_by` has it."""
        if not self.divides_states:
            return "auto"
        return "matrices" if self.matrices else "rows"

    @property
    def streams(self) -> bool:
        """Whether gradients leave with every microbatch, and are never whole."""
        return self.divides_grads

    @property
    def closes(self) -> bool:
        """Whether gradients are whole until the last microbatch, with which they leave."""
        return self.divides_states and not self.divides_grads

    @property
    def unshards(self) -> bool:
        """Whether parameters are made whole once per step."""
        return self.divides_states and not self.divides_params


LEVELS = (
    Zero(0),
    Zero(1, divides_states=True),
    Zero(2, divides_states=True, divides_grads=True),
    Zero(3, divides_states=True, divides_grads=True, divides_params=True),
)
WHOLE = LEVELS[0]


def owners_of(
    params: Mapping[str, torch.Tensor], homes: Mapping[str, Collection[int]], dp: int
) -> dict[str, int]:
    """Owners of those that are trained and have dimensions, the same on every rank.

    The largest first, each to the replica that has the fewest bytes on the stages that hold it
    (Graham's rule: none has more than 4/3 of what the best division would give it). Among equals
    to that with the fewest of its layer, so that a layer is gathered from many.

    Args:
        homes: FQN -> the stages that hold it.
    """
    chosen = {n: p.nbytes for n, p in params.items() if p.requires_grad and p.dim()}
    on_stage: dict[tuple[int, int], int] = defaultdict(int)
    of_layer: dict[tuple[str, int], int] = defaultdict(int)
    owners: dict[str, int] = {}
    for name in sorted(chosen, key=lambda each: -chosen[each]):  # stable: equals in model order

        def load(replica: int, name: str = name) -> tuple[int, int, int]:
            held = sum(on_stage[stage, replica] for stage in homes[name])
            return held, of_layer[layer_of(name), replica], replica

        owner = owners[name] = min(range(dp), key=load)
        of_layer[layer_of(name), owner] += chosen[name]
        for stage in homes[name]:
            on_stage[stage, owner] += chosen[name]
    return {name: owners[name] for name in chosen}


def homes_in(program: PipelineProgram, params: Collection[str]) -> dict[str, tuple[int, ...]]:
    """FQN -> the stages that hold it; a parameter that nothing reads lives on stage 0."""
    holders = {
        name: tuple(stage.stage for stage in program.stages if name in stage.params)
        for name in params
    }
    return {name: stages or (0,) for name, stages in holders.items()}


def layer_of(name: str) -> str:
    """``h.3.attn.weight`` is in ``h.3``; ``wte.weight``, in no numbered module, in ``wte``."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])
