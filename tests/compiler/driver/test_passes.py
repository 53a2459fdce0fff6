"""The list of passes: complete, in order, checked, dumped, and skipped where that is possible."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.driver import assembly, deciding
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.capturing import Shared
from pipecompile.compiler.driver.compiled import Mode
from pipecompile.compiler.driver.passes import ALL, Pass
from pipecompile.compiler.driver.record import Recorder
from pipecompile.compiler.ir.precision import parse_precision
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning.target import Target
from support import jobs, models, plain
from support.commands import SMALL_GPT2, inspect
from support.matrix import quickly

OPTIONAL = [each.name for each in ALL if not each.needed]


def records(**options: Any) -> list[tuple[str, str]]:
    options.setdefault("example_batch", models.batches("gpt2", 4, 1)[0])
    pipe = jobs.pipeline("gpt2", 2, 1, 2, **options)
    return [(record.level, record.name) for record in pipe.compiled.records]


def test_every_pass_runs_once_and_in_the_order_of_the_list() -> None:
    found = records(precision="bf16", zero=0)
    names = [name for _, name in found]
    assert len(set(names)) == len(names)
    order = {each.name: i for i, each in enumerate(ALL)}
    listed = [order[name] for name in names if name in order]
    assert listed == sorted(listed)
    assert {name for _, name in found} - set(order) == {"capture", "keep", "loss", "partition"}
    of_params = {"masters", "operators"}  # and not of operators
    of_some = {
        "gather",
        "latest",
        "carry",
        "fusions",
        "chunks",
        "chunk_gradients",
        "kernels",
    }  # models and options
    assert set(order) - set(names) == {*of_some, *of_params}
    levels = dict.fromkeys(level for level, _ in found)
    assert list(levels) == ["forward", "joint", "placed", "programs", "schedule"]


@pytest.mark.slow
def test_what_there_is_nothing_to_do_for_is_not_in_the_records() -> None:
    names = {name for _, name in records()}
    assert not names & {"autocast", "precision", "boundary", "gather", "latest", "carry"}
    assert not names & {"masters", "operators"}
    assert "autocast" not in {name for _, name in records(precision="bf16_params")}


def test_names_are_distinct() -> None:
    assert len({each.name for each in ALL}) == len(ALL)


@pytest.mark.parametrize("name", [each.name for each in ALL if each.needed])
def test_what_later_passes_need_is_not_skipped(name: str) -> None:
    with pytest.raises(errors.OptionError, match=f"skip='{name}': .*can be skipped"):
        pipecompile.compile(models.build("gpt2"), 2, skip=[name])


def test_a_pass_that_does_not_exist_is_named() -> None:
    with pytest.raises(errors.OptionError, match="no such pass; attention, "):
        pipecompile.compile(models.build("gpt2"), 2, skip=["loewr"])


@cache
def skipping(*skip: str) -> tuple[plain.Trained, dict[str, str]]:
    """What is trained, and said, without some passes; in bf16, so that all have something to do."""
    pipe = jobs.pipeline("gpt2", 2, 1, 2, precision="bf16", remat="full", skip=skip)
    return plain.train_pipeline(pipe, models.batches("gpt2", 4, 1)), dict(pipe.plan.notes)


def test_a_pass_that_has_nothing_to_do_is_not_skipped() -> None:
    """Attention's kernels are those of the CPU already."""
    with pytest.raises(errors.OptionError, match="skip='kernels' has no effect"):
        skipping("kernels")


@pytest.mark.parametrize("name", quickly(["boundary"], sorted({*OPTIONAL} - {"kernels"})))
def test_a_skipped_pass_is_said_to_be_and_changes_no_bit(name: str) -> None:
    (whole, _), (found, said) = skipping(), skipping(name)
    assert said[name] == "skipped"
    assert "skipped" not in said.get("capture", "")
    for mine, theirs in zip(whole.losses, found.losses, strict=True):
        assert torch.equal(mine, theirs)
    for name_, grad in whole.grads[0].items():
        assert torch.equal(grad, found.grads[0][name_]), name_


def test_checks_run_after_every_pass_and_dumps_are_of_its_result(tmp_path: Path) -> None:
    seen: list[str] = []

    def run(work: list[int]) -> str:
        work.append(len(work))
        return f"now {len(work)}"

    each = Pass(
        "append",
        run,
        verify=(lambda work: seen.append(f"checked {work}"),),
        dump=lambda work: {".txt": lambda: f"{work}\n"},
    )
    recorder = Recorder(tmp_path)
    work: list[int] = []
    assembly.run("level", (each, each), work, recorder)
    assert seen == ["checked [0]", "checked [0, 1]"]
    assert [record.note for record in recorder.records] == ["now 1", "now 2"]
    assert (tmp_path / "000_append.txt").read_text().splitlines()[1] == "[0]"
    assert (tmp_path / "001_append.txt").read_text().splitlines()[1] == "[0, 1]"


@pytest.mark.slow
def test_drafts_leave_the_graph_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget, several divisions are tried out on one captured graph."""
    texts: dict[Any, list[str]] = defaultdict(list)
    assemble = deciding.assemble

    def watched(settings: Any, graph: Any, *rest: Any) -> Any:
        texts[graph.graph].append(str(graph.graph))
        made = assemble(settings, graph, *rest)
        assert made.graph is not graph
        return made

    monkeypatch.setattr(deciding, "assemble", watched)
    batch = models.batches("gpt2", 8, 1)[0]
    loose = jobs.pipeline("gpt2", 2, 1, 4, example_batch=batch)
    peak = max(stage.memory.peak for stage in loose.plan.stages)
    jobs.pipeline("gpt2", 2, 1, 4, example_batch=batch, memory=int(0.9 * peak))
    assert max(map(len, texts.values())) > 1
    assert all(len(set(each)) == 1 for each in texts.values())


@pytest.mark.slow
def test_the_draft_that_is_chosen_is_what_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of it differs from what is made for the decision anew."""
    batch = models.batches("gpt2", 8, 1)[0]
    loose = jobs.pipeline("gpt2", 2, 1, 4, example_batch=batch)
    memory = int(0.9 * max(stage.memory.peak for stage in loose.plan.stages))
    calls: list[bool] = []
    assemble = deciding.assemble

    def counted(settings: Any, *rest: Any) -> Any:
        calls.append(settings.drafts)
        return assemble(settings, *rest)

    monkeypatch.setattr(deciding, "assemble", counted)
    told = []
    for forgets in (False, True):
        calls.clear()
        if forgets:
            monkeypatch.setattr(deciding, "Draft", lambda *_: None)
        pipe = jobs.pipeline("gpt2", 2, 1, 4, example_batch=batch, memory=memory)
        assert set(calls) == ({True, False} if forgets else {True})
        programs = [part.text() for s in pipe.compiled.program.stages for part in (s.forward,)]
        pipe.plan.save(tmp_path / "plan.json")
        names = [(record.name, record.note) for record in pipe.compiled.records]
        told.append(((tmp_path / "plan.json").read_text(), programs, names))
    assert told[0] == told[1]


def test_a_skip_without_effect_is_refused() -> None:
    batch = models.batches("gpt2", 4, 1)[0]
    with pytest.raises(errors.OptionError, match="skip='boundary' has no effect"):
        jobs.pipeline("gpt2", 2, 1, 2, example_batch=batch, skip=["boundary"])


@pytest.mark.slow
def test_inspect_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(f"{SMALL_GPT2} --stages 2 --precision bf16 --passes --skip inplace", capsys)
    rows = re.findall(
        r"^ *(\d+)  (\w+) +(\w+) +[\d.]+ (?:s|ms|µs) *(.*)$",
        report.partition("\npasses\n")[2],
        re.M,
    )
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    found = {name: (level, note.strip()) for _, level, name, note in rows}
    assert found["inplace"] == ("programs", "skipped")
    assert found["schedule"] == ("schedule", "1f1b, 8 microbatches")
    assert found["attention"][0] == "forward"
    assert "casts" in found["precision"][1]


def test_passes_go_with_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *SMALL_GPT2.split(), "--stages", "2", "--passes", "--json"]) == 2
    assert "--passes has no effect on --json" in capsys.readouterr().err


@pytest.mark.slow
def test_builders_that_share_a_graph_tell_alike_what_was_done() -> None:
    """And a pass of the shared part that is skipped is not said to have had nothing to do."""
    skeleton = skeleton_of(models.gpt2(n_layer=1), torch.device("cpu"), parse_precision("bf16"))
    spec = flatten(models.batches("gpt2", 1, 1)[0])[1]
    options = CompileOptions(n_stages=2, precision="bf16", skip=("precision",))
    captured = Shared()
    told = [
        Builder(skeleton, given, Target(torch.device("cpu"), CPU), captured=captured)
        .build(Mode.TRAIN, spec, 2)
        .plan.notes
        for given in (options, replace(options, schedule="zb_h1"))
    ]
    first, second = ([note for note in notes if note[0] != "schedule"] for notes in told)
    assert [name for name, _ in first] == [name for name, _ in second]
    assert len(captured.graphs) == 1
    assert dict(first)["capture"] == dict(second)["capture"]
    assert dict(second)["precision"] == "skipped"
