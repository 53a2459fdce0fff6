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
trained one replica has all rows, and the others none (`shards.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


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
