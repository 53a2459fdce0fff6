"""``cut=``, ``pin=`` and ``plan=`` in runs whose processes come and go.

They are about one division, so that no search goes beside them. ``pin=`` and ``cut=`` need a number
of stages that stays; replicas may change. ``plan=`` is used whenever the division that it was made
for is one that the processes allow, and else it is planned anew.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Any

from ...compiler.api import compile_among
from ...compiler.capture import batch as batches
from ...compiler.driver.auto import Open
from ...compiler.ir.errors import OptionError
from ...compiler.options.arguments import Arguments
from ...compiler.options.microbatches import cut as rows_of
from ...compiler.plan.plan import Plan
from ..pipeline import Pipeline

WHY = {
    "pin": "names stages, whose number is left open",
    "cut": "makes batches that cannot be planned for beforehand",
}


@dataclass(frozen=True)
class Settled:
    """What is settled before the processes are known.

    Attributes:
        plan: as it was loaded; None where none was given.
        always: whether every division of this run is to be used without a search.
    """

    plan: Plan | None
    always: bool

    @staticmethod
    def of(arguments: Arguments, n_stages: object, limits: tuple[int, int] | None) -> Settled:
        """
        Args:
            n_stages: as the user has given it.
            limits: the fewest and the most of it; None for any.

        Raises:
            OptionError: one of the three has nothing that it could be about.
            PlanError: the plan cannot be read.
        """
        asked = [name for name in WHY if getattr(arguments, name) is not None]
        for name in asked:
            if limits is None or limits[0] != limits[1]:
                raise OptionError(
                    f"{name}= of session.compile() {WHY[name]} by n_stages={n_stages!r}: give one "
                    "number, such as n_stages=2 (replicas still follow from the processes), or "
                    f"leave {name}= out"
                )
        given = arguments.plan
        plan = given if isinstance(given, Plan) or given is None else Plan.load(given)
        if plan is None:
            return Settled(None, bool(asked))
        if "pin" in asked:
            raise OptionError("pin= has no effect beside plan=: the plan has decided already")
        least, most = limits or (plan.n_stages, plan.n_stages)
        if not least <= plan.n_stages <= most:
            raise OptionError(
                f"plan= is of {plan.n_stages} stages, which n_stages={n_stages!r} never allows: "
                "leave one of them out"
            )
        return Settled(plan, bool(asked))

    @property
    def devices(self) -> int | None:
        """How many it is for, where one process plays all ranks."""
        return None if self.plan is None else self.plan.n_stages * self.plan.dp

    def compiled(self, arguments: Arguments, open_: Open, used: int) -> Pipeline | None:
        """The pipeline of a division that needs no search; None where one does.

        Args:
            open_: divisions of ``used`` devices.
        """
        plan, ways = self.plan, open_.divisions(used)
        if plan is not None:
            whole = open_.global_microbatches
            same = whole in (None, plan.microbatches * plan.dp)
            if (plan.n_stages, plan.dp) not in ways or not same:
                self._say_anew(plan, used, whole)
                plan = None
        if plan is None and not self.always:
            return None
        n_stages, dp = ways[0] if plan is None else (plan.n_stages, plan.dp)
        whole = open_.global_microbatches
        shaped = replace(
            arguments,
            n_stages=n_stages,
            dp=dp,
            microbatches=whole // dp if whole else None,
            plan=plan,
            devices=None,
            example_batch=None,
        )
        if arguments.example_batch is None:
            raise OptionError("session.compile() needs example_batch=, the batch of all replicas")
        pipe = compile_among(shaped, replace(open_, divides=False))
        pipe.compile_for(_share(pipe, arguments))
        return pipe

    def _say_anew(self, plan: Plan, used: int, whole: int | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            asked = f" and global_microbatches={whole}" if whole else ""
            print(
                f"pipecompile: plan= is of {plan.n_stages} stages × dp {plan.dp} with "
                f"{plan.microbatches} microbatches each, which is no division of {used} "
                f"processes{asked} here: planned anew",
                file=sys.stderr,
                flush=True,
            )


def _share(pipe: Pipeline, arguments: Arguments) -> Any:
    """Of the example, what this process gets of batches."""
    example, shards, shard = arguments.example_batch, pipe.data_shards, pipe.data_shard
    if shards == 1:
        return example
    if arguments.cut is not None:
        parts = list(arguments.cut(example, shards))
        if len(parts) != shards or any(part is None for part in parts):
            raise OptionError(
                f"cut= makes {sum(part is not None for part in parts)} batches of example_batch=, "
                f"and there are {shards} replicas: give an example that has something for each"
            )
        return parts[shard]
    values, whole = batches.flatten(example)
    rows = rows_of(whole.rows, shards)
    return whole.with_rows(rows[shard]).build(batches.cut(values, rows)[shard])
