"""One class per user mistake.

Every message gives the numbers or names that clash, and the option or the code to change.
"""

from __future__ import annotations

from typing import Any


class PipecompileError(Exception):
    """Base of every error that pipecompile raises on purpose."""


class OptionError(PipecompileError, ValueError):
    """An option that is unknown, out of range, or has no effect."""


class BackendError(OptionError):
    """A backend that cannot compile, here or this model."""


class WorldSizeError(PipecompileError, RuntimeError):
    """The number of processes does not fit n_stages × dp."""


class BatchError(PipecompileError, ValueError):
    """A batch that the model does not take, or that cannot be cut as asked."""


class RaisedError(BatchError):
    """The model's own code raises on a batch, as it does on one device."""


class SpecError(PipecompileError, ValueError):
    """A SPEC that names no model, or one that cannot be built."""


class ProblemFileError(PipecompileError, ValueError):
    """A file that is no planning problem, or one of a format that is not known."""


class RankMismatchError(PipecompileError, RuntimeError):
    """Ranks that were given different models, batches or options."""


class CaptureError(PipecompileError, RuntimeError):
    """A model that cannot be turned into one graph.

    Attributes:
        module: the submodule that cannot be traced, where one is to blame; "" is the model itself.
    """

    def __init__(self, message: str, module: str | None = None):
        super().__init__(message)
        self.module = module


class RegionError(CaptureError):
    """A submodule that cannot run eagerly inside a graph.

    Attributes:
        cache: because it is given a cache of keys and values.
    """

    def __init__(self, message: str, module: str | None = None, cache: bool = False):
        super().__init__(message, module)
        self.cache = cache


class LossError(PipecompileError, ValueError):
    """No loss was found, or it is not a differentiable scalar."""


class PartitionError(PipecompileError, ValueError):
    """The graph cannot be divided as asked."""


class MemoryBudgetError(PartitionError):
    """No division fits into memory, or none was found that does.

    Attributes:
        over_bytes: per stage, what the nearest division needs above the budget; 0 if it fits.
        nearest: the legal division (an `ir.problem.Solution`) with the smallest such excess.
        proven: no division fits at all.
    """

    def __init__(
        self, message: str, over_bytes: tuple[float, ...], nearest: Any, proven: bool
    ) -> None:
        super().__init__(message)
        self.over_bytes = over_bytes
        self.nearest = nearest
        self.proven = proven

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels from rank 0 to the others."""
        return type(self), (str(self), self.over_bytes, self.nearest, self.proven)


class PlanError(PipecompileError, ValueError):
    """A plan that is damaged, or made for something else."""


class SharedStorageError(PipecompileError, ValueError):
    """Parameters that overlap in memory without being one tensor."""


class StateError(PipecompileError, ValueError):
    """A state dict, or files, that do not fit the model; weights that nothing makes; or a pipeline
    that two threads call at once."""


class CheckpointError(PipecompileError, RuntimeError):
    """A checkpoint that cannot be written, or one that is damaged or of something else."""


class GradientError(PipecompileError, RuntimeError):
    """Gradients that are infinite or NaN, where that was to be an error."""


class NotCompiledError(PipecompileError, RuntimeError):
    """Something was asked for that exists only after compilation."""


class VerificationError(PipecompileError, AssertionError):
    """A pass left an illegal graph or schedule: a defect of pipecompile, please report it."""


class VerifyError(PipecompileError, AssertionError):
    """A pipeline with `verify=` has computed something else than the model in one process."""


class PeerFailedError(PipecompileError, RuntimeError):
    """Another rank failed first; its traceback is part of the message."""


class TraceError(PipecompileError, ValueError):
    """A trace that cannot be written, a file that is none, or two that are not to be compared."""
