"""What chunked_loss= takes off a stage with a head of real size, planned without weights."""

from __future__ import annotations

import pytest
import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.compiled import Mode
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning.target import Target
from pipecompile.compiler.tensors.fakes import weightless
from support.llama3 import CLASSES, llama3

TOKENS, WIDTH = 4096, 4096  # Llama-3-8B's
LOGITS_BYTES = CLASSES * TOKENS * 2  # in bf16


def peak_of(chunked_loss: int | str) -> int:
    options = CompileOptions(n_stages=1, precision="bf16", chunked_loss=chunked_loss)
    cpu = torch.device("cpu")
    with weightless():
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        spec = flatten({"input_ids": ids, "labels": ids})[1]
        skeleton = skeleton_of(llama3(WIDTH, WIDTH, 1, 32), cpu, options.dtypes)
    builder = Builder(skeleton, options, Target(cpu, H100, float("inf")))
    return int(builder.build(Mode.TRAIN, spec, 4).plan.stages[0].memory.peak)


@pytest.mark.slow
def test_the_peak_falls_by_the_copies_of_the_logits() -> None:
    """One in bf16 and some in fp32, down to what the gradient of the head's weight takes."""
    assert peak_of("off") - peak_of(256) > 4 * LOGITS_BYTES
