"""Predictions of published training runs come true.

Three runs of llm-foundry's benchmarking tables, as `make published` plans all of a file.
"""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import pytest
from bench import published

ROWS = """\
model,d_model,n_heads,n_layers,vocab,seq,gpu,n_gpus,rows_per_gpu,grad_accum,recompute,precision,\
sharding,tokens_per_s_per_gpu
1b,2048,16,24,50368,2048,h100_80gb,8,14,1,False,amp_bf16,FULL_SHARD,45455
7b,4096,32,32,50368,4096,a100_80gb,8,16,2,True,amp_bf16,FULL_SHARD,3684
350m,1024,16,24,50368,1024,a100_40gb,8,32,4,False,bf16,FULL_SHARD,62523
"""
RUNS = [published.Run.of(i, row) for i, row in enumerate(csv.DictReader(ROWS.splitlines()), 1)]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.model)
def test_a_run_is_predicted(run: published.Run) -> None:
    found = published.predict(run)
    assert abs(found.error) < 0.1
    assert found.fits
    assert not found.pieces


@pytest.mark.slow
def test_a_depth_follows_from_two_others() -> None:
    few = replace(RUNS[2], n_layers=8)
    extended, whole = published.predict(few), published.predict(few, whole=True)
    assert extended.step_s == pytest.approx(whole.step_s, rel=1e-3)
    assert extended.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)


FOLDER = os.environ.get("PIPECOMPILE_PUBLISHED", "")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="PIPECOMPILE_PUBLISHED names no folder with throughput.csv")
def test_all_runs_of_a_file_are_predicted() -> None:
    found = [published.predict(run) for run in published.runs_in(Path(FOLDER))]
    errors = sorted(abs(each.error) for each in found)
    assert median(errors) <= 0.1
    assert quantiles(errors, n=10, method="inclusive")[-1] <= 0.2
    assert all(each.fits for each in found)
