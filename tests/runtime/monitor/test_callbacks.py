"""Callbacks: called on rank 0, once per step, in order; and what the ready ones write."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pipecompile import callbacks
from pipecompile.errors import OptionError
from support import rated
from support.gang import Gang, free_port


class Notes(callbacks.Callback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def on_start(self, pipe: Any) -> None:
        self.told.append(("start",))

    def on_step(self, pipe: Any, metrics: Any) -> None:
        assert metrics is pipe.metrics
        self.told.append(("step", metrics.step, metrics.rows))

    def on_evaluate(self, pipe: Any, results: Any) -> None:
        self.told.append(("evaluate", pipe.steps, list(results)))

    def on_save(self, pipe: Any, path: Path) -> None:
        self.told.append(("save", path.name))


def told(folder: Path) -> tuple[list[Any], list[Any]]:
    first, late = Notes(), Notes()
    pipe = rated.pipeline(callbacks=[first, SimpleNamespace(on_save=late.on_save)], verify=1)
    loader = pipe.loader(rated.data_set(), rated.BATCH)
    for i, batch in enumerate(loader):
        pipe.step(batch)
        if i == 1:
            pipe.callbacks.append(late)
    pipe.evaluate(loader)
    pipe.evaluate(loader, metrics={"accuracy": rated.accuracy})
    pipe.predict(loader)
    pipe.save(folder)
    return first.told, late.told


EVENTS = [
    ("step", 3, 5),
    ("step", 4, 1),
    ("evaluate", 4, ["loss"]),
    ("evaluate", 4, ["loss", "accuracy"]),
    ("save", "step-00000004"),
]


def test_rank_0_is_told_once_of_everything(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    (first, late), *others = gang(4).run(told, tmp_path)
    assert first == [("start",), ("step", 1, 5), ("step", 2, 5), *EVENTS]
    assert late == [("start",), *EVENTS[:-1], ("save", "step-00000004"), EVENTS[-1]]
    assert others == [([], [])] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (callbacks.Console(), "give a list"),
        ([callbacks.Console], r"\[Console\]: give an object, Console\(...\)"),
        ([print], "it has none of on_start, on_step, on_evaluate, on_save: derive it from"),
        ("console", "give a list"),
    ],
)
def test_what_callbacks_are(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=f"callbacks=.*{message}"):
        rated.pipeline(callbacks=given)


class Broken(callbacks.Callback):
    def on_step(self, pipe: Any, metrics: Any) -> None:
        raise ArithmeticError("no numbers")


def test_an_error_names_its_callback_and_the_step_is_taken() -> None:
    pipe, other = rated.pipeline(callbacks=[Broken()]), rated.pipeline()
    with pytest.raises(ArithmeticError, match="no numbers") as caught:
        pipe.step(rated.batches()[0])
    assert caught.value.__notes__ == ["in Broken.on_step, a callback of rank 0"]
    pipe.callbacks.clear()
    other.step(rated.batches()[0])
    assert pipe.step(rated.batches()[1]) == other.step(rated.batches()[1])


def caught_and_gone_on() -> float:
    """A script that catches the error goes on, with all ranks."""
    pipe = rated.pipeline(callbacks=[Broken()])
    for batch in pipe.loader(rated.data_set(), rated.BATCH):
        try:
            pipe.step(batch)
            assert os.environ["RANK"] != "0"
        except ArithmeticError:
            assert os.environ["RANK"] == "0"
    return pipe.metrics.loss


def test_an_error_that_is_caught_keeps_nobody_waiting(gang: Callable[[int], Gang]) -> None:
    assert len(set(gang(4).run(caught_and_gone_on))) == 1


def cannot_start(path: Path) -> str:
    with pytest.raises(OptionError) as caught:
        rated.pipeline(callbacks=[callbacks.JSONL(path)])
    return str(caught.value)


def test_a_file_that_cannot_be_written_is_told_before_the_first_step(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for message in gang(4).run(cannot_start, tmp_path / "file" / "run.jsonl"):
        assert message.startswith("JSONL(")
        assert "cannot be written: " in message


# -- files ------------------------------------------------------------------------------------


def run(*given: Any, steps: int = 3, **options: Any) -> Any:
    pipe = rated.pipeline(1, 1, 1, callbacks=given, **options)
    for batch in rated.batches()[:steps]:
        pipe.step(batch)
    pipe.evaluate(rated.batches()[0], metrics={"accuracy": rated.accuracy})
    return pipe


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "below" / "run.jsonl"
    pipe = run(callbacks.JSONL(path), callbacks.JSONL(tmp_path / "few", every=2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (3, "evaluate"),
    ]
    assert lines[2]["loss"] == pipe.metrics.loss
    assert lines[2]["lr"] == 0.1
    assert set(lines[3]) == {"step", "kind", "loss", "accuracy"}
    few = [json.loads(line)["step"] for line in (tmp_path / "few").read_text().splitlines()]
    assert few == [2, 3]


def test_csv_is_one_table_also_of_a_run_that_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    for _ in range(2):
        run(callbacks.CSV(path, metrics=["accuracy"]))
    rows = list(csv.DictReader(path.open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "3"] * 2
    assert rows[0]["loss"] == rows[4]["loss"] != ""
    assert rows[0]["accuracy"] == rows[0]["bubble"] == ""
    assert 0 <= float(rows[3]["accuracy"]) <= 1
    with pytest.raises(OptionError, match="has no column for 'accuracy': give CSV"):
        run(callbacks.CSV(tmp_path / "other.csv"))
    with pytest.raises(OptionError, match="the file that is there has other columns"):
        run(callbacks.CSV(path))


@pytest.mark.parametrize("every", [0, True, "2"])
def test_every(every: Any) -> None:
    with pytest.raises(OptionError, match="every="):
        callbacks.JSONL("run.jsonl", every=every)


# -- the console ------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_lines() -> None:
    file = io.StringIO()
    run(callbacks.Console(total=3, every=2, file=file))
    first, last, evaluated = file.getvalue().splitlines()
    assert first.startswith("step 2/3  loss ")
    assert last.startswith("step 3/3  loss ")
    for part in ("tokens/s", "planned", "lr 1.00e-01", "0:00:00 left"):
        assert part in last
    assert "MFU" not in last
    assert evaluated.startswith("step 3  evaluated: loss ")
    assert ", accuracy 0" in evaluated


def test_plain_lines_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step, and the last; others where ten seconds have passed."""
    times = iter([0.0, 1.0, 10.5, 11.0])
    monkeypatch.setattr("pipecompile.runtime.monitor.console.time.monotonic", lambda: next(times))
    file = io.StringIO()
    run(callbacks.Console(file=file), steps=4)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1", "3", "4"]


def test_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = Screen()
    run(callbacks.Console(total=3, every=1, file=file), hardware="cpu")
    text = file.getvalue()
    assert "███░░░░░░░  step 1/3" in text
    assert "██████████  step 3/3" in text
    assert "MFU" in text
    assert "\x1b[?25l" in text  # the cursor is hidden, and shown again
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


# -- others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [
        (lambda: callbacks.TensorBoard("runs"), "torch.utils.tensorboard", "tensorboard"),
        (callbacks.WandB, "wandb", "wandb"),
        (callbacks.MLflow, "mlflow", "mlflow"),
        (callbacks.Neptune, "neptune", "neptune"),
    ],
)
def test_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[[], Any], module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"needs {package}, which is not installed \(.*\): pip install {package}"
    with pytest.raises(OptionError, match=message):
        kind()


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module that is not installed."""
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int):
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def flush(self) -> None:
            written.append("flush")

    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    run(callbacks.TensorBoard("runs", every=2), steps=3)
    assert written[0] == ("runs", 2)
    assert ("train/loss", 2) in written
    assert ("train/loss", 3) not in written
    assert written[-3:] == [("evaluate/loss", 3), ("evaluate/accuracy", 3), "flush"]


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    stand_in(
        monkeypatch,
        "wandb",
        run=None,
        init=lambda **options: told.append(options),
        log=lambda numbers, step: told.append((step, numbers)),
    )
    run(callbacks.WandB(project="mine"), steps=1)
    assert told[0] == {"project": "mine"}
    assert told[1][0] == 1
    assert "train/loss" in told[1][1]
    assert set(told[2][1]) == {"evaluate/loss", "evaluate/accuracy"}


def test_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    stand_in(
        monkeypatch,
        "mlflow",
        active_run=lambda: None,
        start_run=lambda **options: told.append(options),
        log_metrics=lambda numbers, step: told.append((step, numbers)),
    )
    run(callbacks.MLflow(run_name="mine"), steps=1)
    assert told[0] == {"run_name": "mine"}
    assert told[1][1]["train/overflowed"] == 0.0
    assert set(told[2][1]) == {"evaluate/loss", "evaluate/accuracy"}


def test_neptune() -> None:
    series: dict[str, list[Any]] = {}

    class Series:
        def __init__(self, name: str):
            self.name = name

        def append(self, value: float, step: int) -> None:
            series.setdefault(self.name, []).append(step)

    class Run:
        def __getitem__(self, name: str) -> Series:
            return Series(name)

    run(callbacks.Neptune(Run()), steps=2)
    assert series["train/loss"] == [1, 2]
    assert series["evaluate/accuracy"] == [2]


# -- a script that ends by an error -------------------------------------------------------------

SCRIPT = """
import torch, pipecompile
class Broken:
    def on_step(self, pipe, metrics):
        if metrics.step == 2:
            raise ArithmeticError("no numbers")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
pipe = pipecompile.compile(
    model, 2, microbatches=2, optimizer=torch.optim.SGD, callbacks=[Broken()],
    loss_fn=lambda output, batch: output.square().mean(),
)
for _ in range(1000):
    pipe.step(torch.ones(4, 4))
"""


@pytest.mark.slow
def test_a_script_that_ends_by_a_callback_ends_on_all_ranks(tmp_path: Path) -> None:
    script, port = tmp_path / "train.py", str(free_port())
    script.write_text(SCRIPT)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        first, other = (each.communicate(timeout=90)[1] for each in ranks)
    finally:
        for each in ranks:
            each.kill()
    assert all(each.returncode for each in ranks)
    assert "ArithmeticError: no numbers" in first
    assert "in Broken.on_step, a callback of rank 0" in first
    assert "PeerFailedError: rank 0 (stage 0, replica 0) failed first" in other
    assert "in Broken.on_step, a callback of rank 0" in other
