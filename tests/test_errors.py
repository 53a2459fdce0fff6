"""Bad input: one clear message that names the option or the place, before any work starts."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from support import models
from torch import nn

SGD = partial(torch.optim.SGD, lr=0.1)
X = torch.randn(4, 8)
OTHERS = torch.optim.lr_scheduler.StepLR(SGD([nn.Parameter(X)]), 1)


class Tiny(nn.Module):
    """Returns a scalar; subclasses break one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x)).square().mean()


class Branching(Tiny):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        if y.sum() > 0:  # data-dependent
            y = -y
        return self.second(y).mean()


class Reading(Tiny):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        return self.second(y).mean() * float(y.sum())


class Selecting(Tiny):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        return self.second(y[y.sum(1) > 0]).mean()


class Vector(Tiny):
    def forward(self, x: torch.Tensor) -> Any:
        return {"loss": self.second(self.first(x)).mean(1), "hidden": x}


class Lossless(Tiny):
    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": self.second(self.first(x)), "hidden": x}


class Detached(Tiny):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).detach()


def compile_(model: nn.Module | None = None, n_stages: Any = 1, **options: Any) -> Any:
    options.setdefault("example_batch", X)
    return pipecompile.compile(Tiny() if model is None else model, n_stages, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_stages": 0}, "n_stages=0 must be at least 1"),
        ({"n_stages": -2}, "n_stages=-2"),
        ({"n_stages": 2.0}, "n_stages=2.0 must be an int"),
        ({"n_stages": True}, "n_stages=True must be an int"),
        ({"dp": 0}, "dp=0 must be at least 1"),
        ({"microbatches": 0}, "microbatches=0 must be at least 1"),
        ({"n_stages": 10**9}, "n_stages=1000000000 must be at most 65536"),
        ({"dp": 10**9}, "dp=1000000000 must be at most"),
        ({"n_stages": 1 << 9, "dp": 1 << 9}, "n_stages=512 × dp=512 are 262144 ranks, and there"),
        ({"microbatches": 10**9}, "microbatches=1000000000 must be at most"),
        ({"n_stages": "auto", "devices": 10**9}, "devices=1000000000 must be at most"),
        ({"n_stages": "auto", "devices": "x"}, "devices='x' must be an int"),
        ({"optimizer": SGD, "max_grad_norm": "x"}, "max_grad_norm='x' must be a number"),
        ({"time_limit_s": "x"}, "time_limit_s='x' must be a number"),
        ({"seed": 1.5}, "seed=1.5 must be an int"),
        ({"pin": "x"}, "pin='x': give a dict such as"),
        ({"pin": {1: 0}}, "pin={1: 0}: give the dotted name of a module"),
        ({"pin": {"first": True}}, "pin={'first': True}: a stage is an int"),
        ({"plan": 5}, "plan=5: give a Plan, or the path"),
        ({"hardware": 5}, "hardware=5: give a name"),
        ({"dump_dir": 5}, "dump_dir=5: give the path of a folder"),
        ({"skip": 5}, "skip=5: give a list of names"),
        ({"device": 5.5}, "device=5.5 is not a device"),
        ({"schedule": []}, r"schedule=\[\]: give a name, such as '1f1b', or a file's path"),
        ({"zero": 1.0, "dp": 2}, "zero=1.0: use 0, 1, 2, 3"),
        ({"micro_batches": 4}, "unknown option 'micro_batches': did you mean 'microbatches'"),
        ({"flavour": 1}, "unknown option 'flavour': known are"),
        ({"optimizer": "adamw"}, "optimizer='adamw' is not callable.*factory"),
        (
            {"optimizer": SGD([nn.Parameter(X)])},
            r"given an optimizer, SGD, .*functools.partial\(SGD, lr=0.1\)",
        ),
        (
            {"optimizer": SGD, "lr_scheduler": OTHERS},
            r"given a scheduler, StepLR, .*functools.partial\(StepLR, ...\)",
        ),
        ({"loss_fn": 3}, "loss_fn=3 is not callable"),
        ({"max_grad_norm": 1.0}, "max_grad_norm has no effect without optimizer="),
        ({"lr_scheduler": SGD}, "lr_scheduler has no effect without optimizer="),
        ({"optimizer": SGD, "max_grad_norm": 0}, "max_grad_norm=0 must be above 0"),
        ({"tied_grads": "never"}, "tied_grads='never': use 'per_microbatch' or 'per_step'"),
        ({"schedule": "zb_w"}, "schedule='zb_w': did you mean 'zb_v'"),
        ({"schedule": "fast"}, "schedule='fast': use 'gpipe' or '1f1b' or"),
        ({"schedule": "mine.csv"}, "schedule='mine.csv': there is no such file"),
        ({"virtual_stages": 2}, 'schedule="1f1b" deals 1 to each rank; "gpipe" and "interleaved"'),
        ({"schedule": "zb_v", "virtual_stages": 3}, "deals 2 to each rank; .* can have 3"),
        ({"virtual_stages": 0}, "virtual_stages=0 must be at least 1"),
        ({"schedule_memory": "2x1f1b"}, 'no effect with schedule="1f1b"'),
        ({"schedule": "zb", "schedule_memory": "3x"}, "schedule_memory='3x': use 'auto' or"),
        (
            {"schedule": "auto", "example_batch": None},
            'schedule="auto" needs example_batch=',
        ),
        ({"weights": 3}, "weights=3: give the path of a .safetensors file"),
        ({"weights": "gpt2-xl"}, "weights='gpt2-xl' does not exist: .* not the name of a model"),
        ({"device": "abacus"}, "device='abacus' is not a device"),
        ({"device": "meta"}, "runs on 'cpu' and 'cuda'"),
        ({"optimizer": lambda params: 3}, "optimizer= returned a int"),
        ({"optimizer": SGD, "lr_scheduler": lambda _: None}, "lr_scheduler= returned None: give"),
        ({"optimizer": SGD, "lr_scheduler": lambda _: 3}, "lr_scheduler= returned a int: give a"),
        ({"optimizer": SGD, "lr_scheduler": lambda _: OTHERS}, "the scheduler of another optimiz"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        compile_(**options)


def test_the_errors_are_a_module_with_the_same_classes() -> None:
    module = importlib.import_module("pipecompile.errors")
    home = importlib.import_module("pipecompile.compiler.ir.errors")
    assert pipecompile.errors is errors is module
    kinds = {name: kind for name, kind in vars(home).items() if isinstance(kind, type)}
    assert {name: getattr(module, name) for name in kinds} == kinds


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device() -> None:
    with pytest.raises(errors.OptionError, match="sees no CUDA device"):
        compile_(device="cuda")


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("below", ["", "folder"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, below: str, auto: bool) -> None:
    """It is tried before anything is compiled."""
    (tmp_path / "file").touch()
    stages = {"n_stages": "auto", "devices": 2} if auto else {}
    with pytest.raises(errors.OptionError, match=r"dump_dir='.*file.*' cannot be written"):
        compile_(Branching(), dump_dir=tmp_path / "file" / below, **stages)


def test_world_size_names_the_line_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(errors.WorldSizeError, match=r"4.*torchrun --nproc-per-node 6"):
        compile_(n_stages=3, dp=2)


def test_more_stages_than_units() -> None:
    with pytest.raises(errors.PartitionError, match=r"n_stages=40, but .* only \d+ units"):
        compile_(n_stages=40)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (0, {"microbatches": 3}, "the batch has 0 rows"),
        (0, {"dp": 3}, "the batch has 0 rows"),
    ],
)
def test_batches_that_cannot_be_cut(rows: int, options: Any, message: str) -> None:
    with pytest.raises(errors.BatchError, match=message):
        compile_(example_batch=torch.randn(rows, 8), **options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"y": X}, "Tiny.forward needs 'x', and the batch holds 'y'"),
        ({"x": X, "y": X}, "does not take the batch's 'y'; it takes 'x'"),
        ((X, X), "has 2 items, but Tiny.forward takes 1"),
        ({"x": X, "scale": torch.ones(3)}, "disagree on dim 0.*'scale' has 3 rows"),
        ({"x": 3}, "holds no tensor with a batch dimension"),
    ],
)
def test_batches_that_the_model_does_not_take(batch: Any, message: str) -> None:
    with pytest.raises(errors.BatchError, match=message):
        compile_(example_batch=batch)


def test_a_key_that_nobody_reads() -> None:
    with pytest.raises(errors.BatchError, match="neither Tiny nor loss_fn reads the batch's 'y'"):
        compile_(example_batch={"x": X, "y": X}, loss_fn=lambda output, _: output)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Lossless, {}, r"no loss found.*logits: a tensor of shape \[4, 8\].*hidden"),
        (Vector, {}, r'output\["loss"\] has shape \[4\].*\.mean\(\)'),
        (Detached, {}, "does not depend on any trainable parameter"),
        (Lossless, {"loss_fn": lambda out, _: out["logits"]}, r"what loss_fn returned has shape"),
        (Lossless, {"loss_fn": lambda out, _: 3}, "is a int, not a tensor"),
    ],
)
def test_losses(model: Callable[[], nn.Module], options: Any, message: str) -> None:
    with pytest.raises(errors.LossError, match=message):
        compile_(model(), **options)


def test_nothing_to_train() -> None:
    with pytest.raises(errors.LossError, match="nothing to train"):
        compile_(Tiny().requires_grad_(False))


@pytest.mark.parametrize(
    ("model", "line", "advice"),
    [
        (Branching, "if y.sum() > 0", "torch.where"),
        (Reading, "float(y.sum())", "keep it a tensor"),
        (Selecting, "y[y.sum(1) > 0]", "masks of a fixed shape"),
    ],
)
def test_a_model_that_cannot_be_captured(
    capfd: pytest.CaptureFixture[str], model: Callable[[], nn.Module], line: str, advice: str
) -> None:
    with pytest.raises(errors.CaptureError, match=re.escape(line)) as caught:
        compile_(model())
    text = str(caught.value)
    assert "(the model itself)" in text
    assert "test_errors.py:" in text
    assert advice in text
    assert capfd.readouterr().out == ""


def test_a_model_that_raises_is_not_blamed_on_tracing() -> None:
    class Raising(Tiny):
        def forward(self, x: torch.Tensor) -> Any:
            raise RuntimeError("the flux capacitor is empty")

    with pytest.raises(errors.CaptureError, match="flux capacitor is empty"):
        compile_(Raising())


def test_overlapping_parameters() -> None:
    model = Tiny()
    storage = torch.randn(100)
    model.first.weight = nn.Parameter(storage[:64].view(8, 8))
    model.second.weight = nn.Parameter(storage[36:].view(8, 8))
    with pytest.raises(errors.SharedStorageError, match=r"'first.weight' and 'second.weight'"):
        compile_(model)


def test_step_without_an_optimizer() -> None:
    with pytest.raises(errors.OptionError, match=r"step.. needs an optimizer"):
        compile_().step(X)
    with pytest.raises(errors.OptionError, match="was given no optimizer"):
        _ = compile_().optimizer


def test_asking_before_compilation() -> None:
    pipe = pipecompile.compile(Tiny(), 1, optimizer=SGD)
    for ask in (lambda: pipe.plan, lambda: pipe.optimizer, pipe.state_dict, pipe.parameters):
        with pytest.raises(errors.NotCompiledError, match="example_batch="):
            ask()
    assert pipe.compile_for(X) is pipe.plan


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = Tiny()
        model.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(errors.StateError, match="has no weights, and no initialiser sets 'scale'"):
        compile_(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("first.bias"), "missing .'first.bias'"),
        (lambda s: s.update(extra=X), "unexpected .'extra'"),
        (lambda s: s.update({"first.bias": X}), r"'first.bias' has shape \[4, 8\]"),
    ],
)
def test_state_dicts_that_do_not_fit(change: Callable[[Any], Any], message: str) -> None:
    pipe = compile_()
    before = pipe.state_dict()
    state = dict(before)
    state["second.bias"] = state["second.bias"] + 1
    change(state)
    with pytest.raises(errors.StateError, match=message):
        pipe.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in pipe.state_dict().items())


def test_a_tied_weight_with_two_values() -> None:
    pipe = compile_(models.gpt2(), 2, example_batch=models.tokens(4))
    state = pipe.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(errors.StateError, match="one tied tensor, with two values"):
        pipe.load_state_dict(state)
