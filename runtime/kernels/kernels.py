"""Programs whose fusions are compiled."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from ...compiler.ir.errors import BackendError
from ...compiler.ir.program import ANY_STRIDES, Program, StageProgram, fusions_of, on_demand
from ...passes.programs.fusions import fused_stage


class Kernel(nn.Module):
    """A fusion as it was compiled; boxed, and its results have the strides that were traced."""

    def __init__(self, run: Any, fusion: fx.GraphModule):
        super().__init__()
        (output,) = fusion.graph.find_nodes(op="output")
        self._strides = [
            None if node.meta.get(ANY_STRIDES) else node.meta["val"].stride()
            for node in output.args[0]
        ]
        self._run, self._keeps_strides = run, False

    def forward(self, boxed: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        made: Sequence[torch.Tensor] = self._run(boxed)
        if self._keeps_strides:
            return made
        return self._conformed(made)

    def _conformed(self, made: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Its shapes never change, so what one call returns tells of all."""
        pairs = list(zip(made, self._strides, strict=True))
        self._keeps_strides = all(stride in (None, tensor.stride()) for tensor, stride in pairs)
        return [_conform(tensor, stride) for tensor, stride in pairs]


def _conform(tensor: torch.Tensor, stride: tuple[int, ...] | None) -> torch.Tensor:
    if stride is None or tensor.stride() == stride:
        return tensor
    given = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return given.copy_(tensor)


_known: WeakValueDictionary[tuple[Any, ...], Kernel] = WeakValueDictionary()
"""Of this process, as long as a program calls them, by what they depend on: the fusion's name,
which is a hash of it, the device, how many threads, and whether kernels must be deterministic."""


def with_kernels(program: Program, device: torch.device) -> Program:
    """The program with its fusions compiled; itself where it has none.

    Raises:
        BackendError: one cannot be compiled.
    """
    fusions = fusions_of(program)
    if not fusions:
        return program
    root = nn.Module()
    for name, tensor in program.module.named_buffers():
        root.register_buffer(name, tensor)
    for name, fusion in fusions.items():
        root.add_module(name, _kernel(name, fusion, program, device))
    return replace(program, module=on_demand(root, program.module.graph))


def compiled_stage(stage: StageProgram, device: torch.device) -> StageProgram:
    """A stage's programs, fused and compiled as those that run are."""
    fused = fused_stage(stage, {})
    return fused.with_parts({k: with_kernels(each, device) for k, each in fused.parts.items()})


def _kernel(name: str, fusion: fx.GraphModule, program: Program, device: torch.device) -> Kernel:
    from . import inductor  # what takes seconds to import, and only this backend needs

    exact = torch.are_deterministic_algorithms_enabled()
    key = (name, device, torch.get_num_threads(), exact)
    kernel = _known.get(key)
    if kernel is None:
        try:
            with _alone(inductor.folder() / "pipecompile", name):
                run = inductor.compile_fusion(fusion, device)
        except Exception as error:
            call = program.module.graph.find_nodes(op="call_module", target=name)[0]
            where = call.meta.get("module") or "the model"
            raise BackendError(
                f'backend="inductor" could not compile the operators of {where!r} ({name}): '
                f'{error}; give backend="eager"'
            ) from error
        kernel = _known[key] = Kernel(run, fusion)
    return kernel


@contextlib.contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """One process compiles a fusion; others that want the same wait, and find it in the cache.

    Where the folder cannot be written each compiles for itself.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / name).open("w")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
