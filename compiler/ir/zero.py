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

Where there is room, a rank keeps some of what levels 2 and 3 divide whole over a step (`Kept`): a
parameter is then made whole as at level 2, and a gradient leaves as at level 1.

An optimizer that needs whole parameters gets some of them whole instead of rows of each: of what is
trained one replica has all rows, and the others none (`shards.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Kept:
    """What the rank of a stage keeps whole from one microbatch to the next.

    Attributes:
        params: FQNs that are made whole once per step, and not for each program (level 3).
        grads: FQNs whose gradients add up whole, and leave once per step (levels 2 and 3).
    """

    params: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()


NOTHING = Kept()


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
        """Whether gradients leave with every microbatch, but for those that are kept."""
        return self.divides_grads

    def keeping(self, what: str) -> Zero:
        """With what is asked for whole over a step, as `CompileOptions.zero_keep` has it."""
        return replace(self, divides_grads=self.divides_grads and what != "gradients")

    def whole_param(self, name: str, kept: Kept) -> bool:
        """Whether programs find a parameter whole, and do not gather it."""
        return not self.divides_params or name in kept.params

    def whole_grad(self, name: str, kept: Kept) -> bool:
        """Whether a gradient adds up whole over a step."""
        return not self.divides_grads or name in kept.grads

    @property
    def closes(self) -> bool:
        """Whether gradients are whole until the last microbatch, with which they leave."""
        return self.divides_states and not self.divides_grads

    @property
    def unshards(self) -> bool:
        """Whether all parameters are made whole once per step."""
        return self.divides_states and not self.divides_params


def layer_of(name: str) -> str:
    """``h.3.attn.weight`` is in ``h.3``; ``wte.weight``, in no numbered module, in ``wte``."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])


LEVELS = (
    Zero(0),
    Zero(1, divides_states=True),
    Zero(2, divides_states=True, divides_grads=True),
    Zero(3, divides_states=True, divides_grads=True, divides_params=True),
)
WHOLE = LEVELS[0]
