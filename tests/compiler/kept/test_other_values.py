"""Files of kept graphs in which any other value stands."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.kept import folder
from pipecompile.compiler.tensors.fakes import FakeTensorMode
from safetensors import safe_open
from safetensors.torch import save
from support import jobs, models


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, torch.Tensor]]:
    """What one file has: its JSON, and its tensors."""
    path = tmp_path_factory.mktemp("cache")
    with mock.patch.dict(os.environ, {"PIPECOMPILE_CACHE": str(path)}):
        model = models.llama(num_hidden_layers=1)
        pipe = pipecompile.compile(model, 2, microbatches=1, optimizer=jobs.OPTIMIZERS["adamw"])
        pipe.step(models.padded(2))
    largest = max(path.rglob("*.safetensors"), key=lambda each: each.stat().st_size)
    with safe_open(largest, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["pipecompile"]), tensors


@settings(max_examples=25)
@given(st.data())
def test_files_with_other_things_in_them_are_read_or_damaged(
    written: tuple[Any, dict[str, torch.Tensor]], tmp_path_factory: Any, data: st.DataObject
) -> None:
    """Any value of the JSON may be another one: no other error comes of it."""
    told, tensors = copy.deepcopy(written[0]), written[1]
    at = told
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(at[key], (dict, list)) or not at[key]:
            break
        at = at[key]
    at[key] = data.draw(st.sampled_from([None, -1, 10**6, "", "os.system.x", [], ["node", 0], {}]))
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(save(tensors, {"pipecompile": json.dumps(told)}))
    with contextlib.suppress(folder._DAMAGED):
        folder._read(path, FakeTensorMode())
