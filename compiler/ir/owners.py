"""Which replica owns which parameter, where each has whole ones (``zero_by="matrices"``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch

from .program import PipelineProgram

Owners = Mapping[str, int]
"""FQN -> the replica that owns all of it. Parameters that are not named are divided by rows."""


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
