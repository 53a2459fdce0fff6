"""pipecompile: an unmodified PyTorch transformer -> a pipeline-parallel training program.

    pipe = pipecompile.compile(model, n_stages=4, dp=2)
    loss = pipe.step(batch)

Everything is imported when first used, so that `pipecompile --help` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import callbacks, data, elastic, errors
    from .compiler.api import compile
    from .compiler.costs.cluster import Cluster
    from .compiler.costs.hardware import Device
    from .compiler.ir.precision import LossScale, Precision
    from .compiler.plan.plan import Plan
    from .runtime.exchange.preemption import Preemption
    from .runtime.monitor.metrics import Metrics
    from .runtime.outputs.scores import Collected
    from .runtime.pipeline import Pipeline
    from .runtime.stepping.several import Several

__version__ = "0.1.0"
__all__ = [
    "Cluster",
    "Collected",
    "Device",
    "LossScale",
    "Metrics",
    "Pipeline",
    "Plan",
    "Precision",
    "Preemption",
    "Several",
    "__version__",
    "callbacks",
    "compile",
    "data",
    "elastic",
    "errors",
]

_HOMES = {
    "compile": "compiler.api",
    "Cluster": "compiler.costs.cluster",
    "Device": "compiler.costs.hardware",
    "Collected": "runtime.outputs.scores",
    "Metrics": "runtime.monitor.metrics",
    "Pipeline": "runtime.pipeline",
    "Plan": "compiler.plan.plan",
    "Preemption": "runtime.exchange.preemption",
    "Several": "runtime.stepping.several",
    "LossScale": "compiler.ir.precision",
    "Precision": "compiler.ir.precision",
}


def __getattr__(name: str) -> Any:
    if name in ("callbacks", "data", "elastic", "errors"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
