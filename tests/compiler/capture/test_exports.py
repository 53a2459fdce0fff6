"""Graphs that several captures need are exported once, and nobody changes another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from pipecompile.compiler.capture import exports
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.exports import Exports
from pipecompile.compiler.capture.skeleton import Skeleton, skeleton_of
from support import models
from support.matrix import quickly
from torch import nn

HOST = torch.device("cpu")


def captured(skeleton: Skeleton, rows: int, known: Exports | None) -> tuple[str, Any]:
    ids = torch.zeros((rows, 8), dtype=torch.long)
    _, spec = flatten({"input_ids": ids, "labels": ids})
    rest = HOST, (), None, (), True, known
    found = capture_training(skeleton, spec, None, *rest)
    assert found.loss is not None
    return found.graph.text() + found.graph.fingerprint(), found.loss.note


def small() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=48))


@pytest.mark.parametrize("build", quickly([], [small, models.gpt2, models.llama]))
def test_twice_the_rows_of_one_are_those_of_another(build: Callable[[], nn.Module]) -> None:
    skeleton, known = skeleton_of(build(), HOST), Exports()
    fresh = [captured(skeleton, rows, None) for rows in (2, 4)]
    with mock.patch.object(exports, "exported", wraps=exports.exported) as counted:
        shared = [captured(skeleton, rows, known) for rows in (2, 4)]
        assert counted.call_count == 3  # with 2, 4 and 8 rows
        again = [captured(skeleton, rows, known) for rows in (2, 4)]
        assert counted.call_count == 3
    assert fresh == shared == again
