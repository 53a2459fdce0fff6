"""A second run finds what a first one has left, and computes the same bits with it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.compiler.driver.capturing import Capturing
from pipecompile.compiler.kept import folder, plans
from pipecompile.compiler.kept.cache import Cache
from pipecompile.compiler.planning.planner import Planner
from pipecompile.compiler.tensors.fakes import FakeTensorMode
from support import jobs, models
from support.gang import Gang
from torch import nn

Batch = dict[str, torch.Tensor]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def traced() -> Iterator[list[str]]:
    """The modes of the graphs that were traced."""
    found, trace = [], Capturing.trace

    def noted(capturing: Capturing, wanted: Any, *rest: Any) -> Any:
        found.append(str(wanted.mode))
        return trace(capturing, wanted, *rest)

    with mock.patch.object(Capturing, "trace", noted):
        yield found


class Small(nn.Module):
    """A loss of rows with labels, a buffer that is updated, one by which forward decides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("deep", torch.tensor(2))
        self.register_buffer("scale", torch.arange(16.0), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: Any = None) -> dict[str, Any]:
        h = self.embed(x)
        self.seen.add_(h.detach().mean())
        for _ in range(int(self.deep)):
            h = self.norm(h).tanh()
        if mask is not None and not mask.all():
            h = h * mask[..., None]
        logits = self.out(h) + torch.tensor([0.5, 0.25] * 8)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        return {"loss": loss, "logits": logits, "name": "small", "none": None}


def given(rows: int = 4, length: int = 6, masked: bool = False) -> Batch:
    g = torch.Generator().manual_seed(length)
    x = torch.randint(16, (rows, length), generator=g)
    y = x.clone()
    y[0, :3] = -100
    found = {"x": x, "y": y}
    if masked:
        found["mask"] = torch.ones(rows, length)
        found["mask"][:, -1] = 0
    return found


def run(
    batches: list[Batch],
    model: Callable[[], nn.Module] = Small,
    evaluates: bool = True,
    **options: Any,
) -> list[Any]:
    options = {"microbatches": 2, "optimizer": jobs.OPTIMIZERS["adamw"]} | options
    module = model()  # held: forward asks a buffer of it
    pipe = pipecompile.compile(module, 2, **options)
    losses = [pipe.step(batch) for batch in batches]
    if not evaluates:
        return [*losses, *pipe.state_dict().values()]
    losses += [pipe.evaluate(batches[0])]
    result = pipe.forward(batches[0])
    return [*losses, *_tensors(result), *pipe.state_dict().values()]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """What a run leaves, and what it computes."""
    path = tmp_path_factory.mktemp("left")
    with mock.patch.dict(os.environ, {"PIPECOMPILE_CACHE": str(path)}):
        return path, run([given()])


@pytest.fixture
def first(cache: Path, left: tuple[Path, list[Any]]) -> list[Any]:
    """What a first run has computed whose folder the next ones have."""
    shutil.copytree(left[0], cache, dirs_exist_ok=True)
    return left[1]


def _tensors(result: Any) -> list[torch.Tensor]:
    return [each for each in dict(result).values() if isinstance(each, torch.Tensor)]


def same(found: list[Any], others: list[Any]) -> bool:
    return len(found) == len(others) and all(map(torch.equal, found, others))


@pytest.mark.parametrize(
    ("dynamic", "masked", "evaluates"),
    [
        ("auto", True, False),
        pytest.param("auto", True, True, marks=pytest.mark.slow),
        pytest.param("auto", False, True, marks=pytest.mark.slow),
        pytest.param("off", True, True, marks=pytest.mark.slow),
        pytest.param("off", False, True, marks=pytest.mark.slow),
    ],
)
def test_a_second_run_traces_nothing(
    cache: Path, traced: list[str], dynamic: str, masked: bool, evaluates: bool
) -> None:
    """For no mode, length and number of rows that the first had; the bits are those of no cache."""
    batches = [given(masked=masked), given(4, 9, masked), given(5, 7, masked), given(4, 8, masked)]
    if not evaluates:  # which is quick
        del batches[2]  # of unequal microbatches
    with mock.patch.dict(os.environ, {"PIPECOMPILE_CACHE": "off"}):
        alone = run(batches, evaluates=evaluates, dynamic=dynamic)
    first = run(batches, evaluates=evaluates, dynamic=dynamic)
    traced.clear()
    with mock.patch.object(Planner, "decide", side_effect=AssertionError("planned again")):
        second = run(batches, evaluates=evaluates, dynamic=dynamic)
    assert not traced
    assert same(first, alone)
    assert same(second, alone)
    run([given(4, 11, masked)], evaluates=evaluates, dynamic=dynamic)
    assert traced


SLOW = pytest.mark.slow
EVALUATES = pytest.mark.parametrize("evaluates", [False, pytest.param(True, marks=SLOW)])


def of_one_layer() -> nn.Module:
    torch.manual_seed(0)
    return models.gpt2(n_layer=1)


@pytest.mark.parametrize(
    "name",
    [
        "one layer",
        *(pytest.param(n, marks=SLOW) for n in ("vit", "llama", "gpt2", "t5", "bert-mlm")),
    ],
)
def test_models_of_transformers(cache: Path, traced: list[str], name: str) -> None:
    small = name == "one layer"
    batches = [models.tokens(4)] if small else models.batches(name, 4, 1)
    build = of_one_layer if small else functools.partial(models.build, name)
    first = run(batches, build, evaluates=not small)
    traced.clear()
    assert same(run(batches, build, evaluates=not small), first)
    assert not traced


@EVALUATES
def test_another_answer_of_the_batch_is_another_graph(
    cache: Path, traced: list[str], evaluates: bool
) -> None:
    run([given(masked=True)], evaluates=evaluates)
    traced.clear()
    full = given(masked=True)
    full["mask"].fill_(1.0)
    other = run([full], evaluates=evaluates)
    assert traced
    with mock.patch.dict(os.environ, {"PIPECOMPILE_CACHE": "off"}):
        assert same(other, run([full], evaluates=evaluates))
    traced.clear()
    run([full], evaluates=evaluates)
    run([given(masked=True)], evaluates=evaluates)
    assert not traced


def test_another_value_of_a_buffer_that_decides_is_another_graph(
    first: list[Any], traced: list[str]
) -> None:
    def deeper() -> nn.Module:
        model = Small()
        model.deep.fill_(3)
        return model

    second = run([given()], deeper, evaluates=False)
    assert traced
    assert not torch.equal(first[0], second[0])


@EVALUATES
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
        {"precision": "bf16_params"},
        {"eager_modules": ["norm"]},
        {"microbatches": 1},
        {"loss_fn": lambda out, batch: out["loss"] * 2},
        {"loss_normalization": "microbatch"},
    ],
    ids=["precision", "params", "eager", "microbatches", "loss_fn", "normalization"],
)
def test_other_options_are_other_graphs(
    first: list[Any], traced: list[str], options: dict[str, Any], evaluates: bool
) -> None:
    with mock.patch.dict(os.environ, {"PIPECOMPILE_CACHE": "off"}):
        alone = run([given()], evaluates=evaluates, **options)
    assert same(run([given()], evaluates=evaluates, **options), alone)
    assert traced.count("train") == 2


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"memory": "1GiB"}, True),
        ({"zero": 1, "dp": 2}, True),
        ({"schedule": "zb_h1"}, True),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)}, True),
        ({"remat": "full"}, True),
        ({}, False),
    ],
    ids=str,
)
def test_other_plans(first: list[Any], options: dict[str, Any], again: bool) -> None:
    """Are searched for where the answer may be another one."""
    with mock.patch.object(Planner, "decide", autospec=True, side_effect=Planner.decide) as decide:
        run([given()], evaluates=False, **options)
    assert decide.called == again


def test_a_damaged_file_is_no_file(cache: Path, first: list[Any], traced: list[str]) -> None:
    files = sorted(cache.rglob("*.safetensors"))
    assert len(files) == 3
    for i, path in enumerate(files):
        data = path.read_bytes()
        other = data.replace(b"call_function", b"call_xunction")
        path.write_bytes((b"", data[: len(data) // 2], other)[i])
    for path in (*cache.rglob("plans/*"), *cache.rglob("optimizers/*")):
        path.write_text("{}")
    assert same(run([given()]), first)
    assert len(traced) == 3
    traced.clear()
    assert same(run([given()]), first)
    assert not traced


def test_a_file_names_nothing_that_is_run(cache: Path, first: list[Any]) -> None:
    """Operators are torch's and ours; all else in a file is data."""
    path = max(cache.rglob("*.safetensors"), key=lambda each: each.stat().st_size)
    data = path.read_bytes()
    for name in (b"os.system.xxxxxx", b"builtins.eval.xx"):
        old = b"aten.addmm.defau"
        assert len(old) == len(name)
        path.write_bytes(data.replace(old, name))
        with pytest.raises(folder._DAMAGED):  # which is no file
            folder._read(path, FakeTensorMode())


def test_the_oldest_are_dropped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in (4, 5):
        run([given(4, length)], evaluates=False, dynamic="off")
    before = sorted(cache.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    total = sum(path.stat().st_size for path in before)
    most = 2 * total // 3
    monkeypatch.setattr(folder, "MOST_BYTES", most)
    run([given(4, 6)], evaluates=False, dynamic="off")
    left = set(cache.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in left) <= most
    assert before[0] not in left
    assert left - set(before)


def test_a_folder_that_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: tuple[Path, list[Any]]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "file"))
    assert same(run([given()]), left[1])


def test_warnings_are_given_again(cache: Path) -> None:
    class Coupled(Small):
        def forward(self, x: torch.Tensor, y: torch.Tensor, mask: Any = None) -> dict[str, Any]:
            found = super().forward(x, y, mask)
            found["loss"] = found["loss"] * found["logits"].mean()
            return found

    said = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            run([given()], Coupled, evaluates=False)
        said.append(sorted({str(each.message)[:60] for each in heard}))
    assert said[0] == said[1]
    assert said[0]


class Opening(Small):
    """What it computes is in a file."""

    path = ""

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: Any = None) -> dict[str, Any]:
        found = super().forward(x, y, mask)
        found["loss"] = found["loss"] * json.loads(Path(self.path).read_text())
        return found


CLASS_WEIGHTS = torch.ones(16)


class Outside(Small):
    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: Any = None) -> dict[str, Any]:
        found = super().forward(x, y, mask)
        found["loss"] = found["loss"] * CLASS_WEIGHTS.mean()
        return found


def test_what_no_hash_tells_is_not_kept(cache: Path, tmp_path: Path, traced: list[str]) -> None:
    Opening.path = str(tmp_path / "rate.json")
    losses = []
    for rate in ("0.5", "0.25"):
        Path(Opening.path).write_text(rate)
        losses.append(run([given()], Opening, evaluates=False)[0])
    assert torch.equal(losses[0], losses[1] * 2)
    assert not list(cache.rglob("*.safetensors"))


class Setting(Small):
    """In training it sets what evaluation reads."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.told = 1.0, {"kind": "none"}

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: Any = None) -> dict[str, Any]:
        found = super().forward(x, y, mask)
        if self.training:
            self.factor = 2.0
        else:
            found["loss"] = found["loss"] * self.factor
        return found


def test_what_forward_sets_is_set_where_its_graph_is_found(cache: Path, traced: list[str]) -> None:
    first = run([given()], Setting)
    kept = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    traced.clear()
    assert same(run([given()], Setting), first)
    assert not traced
    for path, data in kept.items():  # the graph of evaluation is made anew, after training's
        if b'tangent\\": null' in data:
            path.unlink()
    assert same(run([given()], Setting), first)
    assert traced == ["evaluate", "forward"]


def test_tensors_of_others_are_not_kept(cache: Path, traced: list[str]) -> None:
    """A graph has them as constants, and has to see when they change."""
    run([given()], Outside, evaluates=False)
    traced.clear()
    run([given()], Outside, evaluates=False)
    assert "train" in traced


def test_reports_say_where_a_graph_is_from(cache: Path) -> None:
    found = []
    for _ in range(2):
        pipe = pipecompile.compile(Small(), 2, microbatches=2, example_batch=given())
        records = pipe._session.first.records if pipe._session else ()
        found += [record.note for record in records if record.name == "keep"]
    assert found == ["kept for other runs", "from another run"]


def test_off_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIPECOMPILE_CACHE", "off")
    run([given()], evaluates=False)
    assert not list(tmp_path.iterdir())
    assert Cache(None).graphs is None
    assert Cache(tmp_path, searches=True).plans.find("told") is None


def test_writers_at_once(tmp_path: Path) -> None:
    """Each file is that of one of them, whole."""
    path = tmp_path / "deep" / "file"
    texts = [bytes([i]) * 100_000 for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(functools.partial(folder.write, path), texts))
    assert path.read_bytes() in texts
    assert list(path.parent.iterdir()) == [path]


def _piped(path: str) -> tuple[list[torch.Tensor], list[str]]:
    notes: list[str] = []
    with mock.patch.dict(os.environ, {"PIPECOMPILE_CACHE": path}):
        pipe = pipecompile.compile(Small(), 2, microbatches=2, optimizer=jobs.OPTIMIZERS["adamw"])
        losses = [pipe.step(given()) for _ in range(2)]
        for ready in pipe._session.loaded.values() if pipe._session else ():
            notes += [r.note for r in ready.compiled.records if r.name == "keep"]
    return losses, notes


@pytest.mark.slow
def test_ranks_share_the_folder(tmp_path: Path, gang: Callable[[int], Gang]) -> None:
    expected = run([given()] * 2)[:2]
    for note in ("kept for other runs", "from another run"):
        found = gang(2).run(_piped, str(tmp_path))
        for losses, notes in found:
            assert same(losses, expected)
            assert set(notes) <= {note, "from another run"}
    assert not any("kept" in note for _, notes in found for note in notes)


def test_of_plans_the_oldest_are_dropped(
    cache: Path, first: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "MOST_BYTES", 1)
    run([given()], evaluates=False, memory="1GiB")
    assert not list(cache.rglob("plans/*.json"))
