"""What a traced graph depends on besides the model: versions, and settings of torch."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .identity import UntoldError

_BACKENDS = torch.backends
_OWN = Path(__file__).parents[2]
_FOLDERS = ("compiler", "passes", "runtime")


@cache
def versions() -> tuple[str, ...]:
    """Of all that traces, this package's own code included."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _FOLDERS for path in (_OWN / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    python = platform.python_implementation(), platform.python_version()
    return (*python, torch.__version__, np.__version__, digest.hexdigest())


def settings(device: torch.device) -> tuple[Any, ...]:
    """By which torch chooses operators.

    Raises:
        UntoldError: a mode is active that may change any of them.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise UntoldError("a mode of torch is active")
    return (
        *(str(torch.get_default_dtype()), str(torch.get_default_device())),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        *_attention(),
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        *(str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
        torch.is_inference_mode_enabled(),
        *(_BACKENDS.mkldnn.enabled, _BACKENDS.cudnn.enabled),
        _BACKENDS.cpu.get_cpu_capability(),
        *_of_device(device),
    )


def _attention() -> Iterator[bool]:
    backend: Any = _BACKENDS.cuda
    yield backend.flash_sdp_enabled()
    yield backend.mem_efficient_sdp_enabled()
    yield backend.math_sdp_enabled()
    yield backend.cudnn_sdp_enabled()
    yield _BACKENDS.mha.get_fastpath_enabled()


def _of_device(device: torch.device) -> Iterator[Any]:
    yield str(device)
    if device.type == "cuda" and torch.cuda.is_available():
        yield torch.cuda.get_device_name(device)
        yield torch.cuda.get_device_capability(device)
