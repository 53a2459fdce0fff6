"""The solvers of integer programs: HiGHS and CBC, through PuLP.

HiGHS proves what CBC does not; CBC comes with PuLP and stands in where HiGHS is missing or fails.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pulp  # type: ignore[import-untyped]

from .work import Work

# PuLP keeps why a solver is missing, and with it the frames of whoever imported it first: what
# those functions had, such as the first pipeline and its model, would never be let go of.
for _kind in list(vars(pulp).values()):
    if isinstance(_missing := getattr(_kind, "err", None), Exception):
        _missing.__traceback__ = None

# HiGHS does not tell how many iterations it has done, so the checks at which it asks whether to go
# on are counted. How much lies between two of them differs a lot, but not from run to run.
_CHECK_S = 3e-6  # work: of a check, for every number in the program's matrix
_LEAST = 1000  # and for so many more
_BUILD_S = 2e-5  # of making the program and presolving it, for each
_CBC_NODE_S = 1e-6

PROVEN_GAP = 2e-6  # (objective − bound) / objective of a solution that counts as proven
GAP = 1e-6  # the same, for the solvers themselves to stop at


class SolverError(Exception):
    """A solver is not installed, or crashed."""


class WarmHighs(pulp.HiGHS):  # type: ignore[misc]
    """HiGHS, started from the variables' initial values; it remembers its bound and objective.

    It is stopped after so much work, counted at its checks of whether to go on, which come in the
    same order whatever else the machine does.

    Quiet from its first line: 1.16 prints one while it is made, before PuLP can tell it not to, and
    what commands print for programs to read would begin with it.
    """

    bound = -math.inf
    objective: float | None = None
    work: Work

    def createAndConfigureSolver(self, lp: Any) -> None:  # noqa: N802
        import highspy

        untyped: Any = highspy.Highs

        class Quiet(untyped):  # type: ignore[misc]
            def enableCallbacks(self) -> None:  # noqa: N802
                self.setOptionValue("output_flag", False)
                super().enableCallbacks()

        lp.solverModel = Quiet()
        options = {
            "output_flag": False,
            "mip_rel_gap": self.gapRel,
            "threads": self.threads,
            "time_limit": self.timeLimit,
        }
        for option, value in options.items():
            lp.solverModel.setOptionValue(option, value)

    def callSolver(self, lp: Any) -> None:  # noqa: N802
        start = {v.index: v.varValue for v in lp.variables() if v.varValue is not None}
        if start:
            lp.solverModel.setSolution(len(start), list(start), list(start.values()))
        size = lp.solverModel.getNumNz()

        def check(event: Any) -> None:
            self.work.spend(_CHECK_S * (size + _LEAST))
            if self.work.left_s <= 0:
                event.interrupt()

        self.work.spend(_BUILD_S * size)
        lp.solverModel.cbMipInterrupt += check
        lp.solverModel.run()

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802
        highs, info = lp.solverModel, lp.solverModel.getInfo()
        state = highs.modelStatusToString(highs.getModelStatus())
        if "nfeasible" in state:
            return pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible
        if state == "Time limit reached":
            self.work.give_up()
        elif state not in ("Optimal", "Interrupted by user"):
            raise pulp.PulpSolverError(state)
        if lp.isMIP():
            self.bound = info.mip_dual_bound
        elif state == "Optimal":
            self.bound = info.objective_function_value
        self.objective = info.objective_function_value
        if not highs.getSolution().value_valid:
            return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound
        status: tuple[int, int] = super().findSolutionValues(lp)
        return status


def solver_of(name: str, work: Work, warm: bool, size: int) -> Any:
    """PuLP's solver of a name, "highs" or "cbc".

    Args:
        warm: from the variables' initial values.
        size: numbers in the program's matrix.
    """
    limit = max(work.clock_left_s, 0.1)
    if name == "highs":
        highs = WarmHighs(msg=False, threads=1, timeLimit=limit, gapRel=GAP / 2)
        highs.work = work
        return highs
    with warnings.catch_warnings():  # PuLP 3.3 says that 4 will not bring CBC along
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(
            msg=False,
            threads=1,
            timeLimit=limit,
            gapRel=GAP / 2,
            warmStart=warm,
            maxNodes=max(1, round(work.left_s / (_CBC_NODE_S * (size + 1)))),
        )
