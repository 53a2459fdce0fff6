"""`verify=` compares the first steps with one process, and finds what makes them differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.compiler.capture import capture, exporting
from pipecompile.compiler.driver import deciding, passes
from pipecompile.compiler.effects import replaced
from pipecompile.compiler.profiling.optimizer_trial import Reach, Verdict
from pipecompile.compiler.rows.outputs import How, Output
from pipecompile.errors import OptionError, PipecompileError, VerifyError
from pipecompile.runtime.exchange.agreement import Agreement
from pipecompile.runtime.pipeline import Pipeline
from pipecompile.runtime.state.buffers import LatestBuffers
from pipecompile.runtime.verify.report import Report
from support import models, optimizers, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn
from torch.nn.utils import spectral_norm
from torch.optim.lr_scheduler import ReduceLROnPlateau

WIDTH = 8
adamw = partial(torch.optim.AdamW, lr=1e-2)


def verified(name: str, n_stages: int, dp: int, **options: Any) -> str:
    """What was compared, of two steps of a model with dropout where it has some."""
    torch.manual_seed(0)
    model = models.gpt2(dropout=0.1, n_layer=1) if name == "gpt2" else models.build(name)
    pipe = pipecompile.compile(
        model,
        n_stages,
        dp,
        microbatches=2,
        optimizer=adamw,
        max_grad_norm=0.1,
        verify=2,
        **options,
    )
    for batch in models.batches(name, 8, 3):
        pipe.step(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
    return pipe.verification


SETTINGS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("gpt2", 2, 2, {}),
    ("t5", 2, 2, {"zero": 2}),
    ("llama", 3, 1, {"precision": "bf16", "schedule": "zb_h1"}),
    ("bert-classifier", 1, 1, {}),
]


@pytest.mark.parametrize(("name", "n_stages", "dp", "options"), quickly(SETTINGS[3:], SETTINGS))
def test_what_is_right_is_said_to_be(
    name: str, n_stages: int, dp: int, options: dict[str, Any]
) -> None:
    lines = verified(name, n_stages, dp, **options).splitlines()
    kinds = [line.split()[2] for line in lines if line.startswith("step")]
    step = ["loss", "gradients", "norm", "parameters"]
    assert [kind for kind in kinds if kind != "buffers"] == [*step, *step, "evaluation", "outputs"]
    if "zero" not in options:
        assert all(line.endswith("identical to the last bit") for line in lines[: len(kinds)])


@pytest.mark.slow
def test_processes_compare_on_rank_0(gang: Callable[[int], Gang]) -> None:
    first, *others = gang(2).run(verified, "gpt2", 1, 2, zero=1)
    assert first.count("identical to the last bit") > 3
    assert "zero=1 takes the norm of rows" in first
    assert set(others) == {""}


# -- what is wrong is found -----------------------------------------------------------------------


class Model(nn.Module):
    """Layers around what a fault concerns."""

    def __init__(self, **state: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.__dict__.update(state)

    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x

    def forward(self, x: torch.Tensor) -> Any:
        return self.through(x).square().mean()


class Replacing(Model):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.through(x)
        self.mean = 0.5 * self.mean + x.detach().mean(0)
        return (x - self.mean).square().mean()


class LateAndEarly(Model):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.through(x if self.training else x - self.mean)
        if self.training:
            self.mean.add_(x.detach().mean(0))
        return x.square().mean()


class Saving(Model):
    """The backward reads what a buffer was."""

    def forward(self, x: torch.Tensor) -> Any:
        x = self.through(x) * self.mean
        self.mean = self.mean + 0.1 * torch.arange(WIDTH)
        return x.square().mean()


class Counting(Model):
    def __init__(self) -> None:
        super().__init__(count=0)

    def forward(self, x: torch.Tensor) -> Any:
        self.count += 1
        return (self.through(x) / self.count).square().mean()


class Coupling(Model):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.through(x)
        return {"loss": x.square().mean(), "total": x.sum(), "pairs": x @ x.t()}


@contextmanager
def _forgetful(module: nn.Module, *given: Any) -> Iterator[replaced.Replaced]:
    with replaced.replaced_tensors(module, *given):
        yield replaced.Replaced()


def _all_means(names: Any, *_: Any) -> tuple[Output, ...]:
    return tuple(Output(name, How.MEAN) for name in names)


def _without_reads() -> Any:
    kept = tuple(each for each in passes.JOINT if each.name != "latest")
    return mock.patch.object(passes, "JOINT", kept)


FAULTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "replaced buffers are forgotten": (
        Replacing,
        lambda: mock.patch.object(exporting, "replaced_tensors", _forgetful),
        "step 1, loss",
    ),
    "buffers do not reach other stages": (
        LateAndEarly,
        lambda: mock.patch.object(LatestBuffers, "bring", return_value=None),
        "step 2, evaluation",
    ),
    "the backward reads what a buffer is by then": (Saving, _without_reads, "step 1, gradients"),
    "spectral norm's buffers are on two stages": (
        lambda: nn.Sequential(*(spectral_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(4))),
        _without_reads,
        "buffer '2.weight_u' is updated on stage 1 and read on stage 0",  # before any step
    ),
    "a count is taken for a constant": (
        Counting,
        lambda: mock.patch.object(exporting, "check_next_calls", return_value=None),
        "step 1, loss",
    ),
    "all outputs are joined as means": (
        Coupling,
        lambda: mock.patch.object(capture, "outputs_of", _all_means),
        "step 2, outputs: 'total'",
    ),
}


def rows() -> list[torch.Tensor]:
    torch.manual_seed(7)
    return [torch.randn(4, WIDTH) for _ in range(2)]


def train(model: nn.Module, **options: Any) -> str:
    """What is said of two steps."""
    given = {"optimizer": adamw, "max_grad_norm": 0.1, "verify": 2, "microbatches": 2} | options
    pipe = pipecompile.compile(model, 2, **given)
    for batch in rows():
        pipe.step(batch.chunk(pipe.data_shards)[pipe.data_shard])
    return str(pipe.verification)


def _squared(output: Any, _: Any) -> torch.Tensor:
    return output["loss"] if isinstance(output, dict) else output.square().mean()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault: str) -> None:
    make, planted, message = FAULTS[fault]
    with planted(), pytest.raises(PipecompileError, match=message):
        train(make(), loss_fn=_squared)


@pytest.mark.parametrize("make", quickly([LateAndEarly], [Replacing, LateAndEarly, Saving]))
def test_without_the_fault_there_is_nothing_to_find(make: Callable[[], nn.Module]) -> None:
    assert train(make(), loss_fn=_squared).count("identical to the last bit") >= 10


class Scaled(nn.Module):
    """A loss that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (output * self.scale - batch).square().mean()


class Plainly(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.through(x)


def test_a_loss_that_is_trained_is_compared() -> None:
    assert train(Plainly(), loss_fn=Scaled()).count("identical to the last bit") >= 9
    with (
        mock.patch.object(Pipeline, "loss_state_dict", return_value={"scale": torch.ones(WIDTH)}),
        pytest.raises(VerifyError, match=r"parameters: 'loss_fn\.scale'"),
    ):
        train(Plainly(), loss_fn=Scaled())


def misled(factory: Any) -> str:
    """With an optimizer that is taken for what it is not."""
    verdict = Verdict(Reach.ELEMENT, "", "")
    with mock.patch.object(deciding, "try_optimizer", return_value=verdict):
        try:
            return train(Model(), optimizer=factory, max_grad_norm=None, loss_fn=_squared)
        except VerifyError as error:
            return str(error)


def other_data() -> str:
    """One rank skips a batch, and nobody compares them."""
    with mock.patch.object(Agreement, "_check_data", return_value=None):
        rank = int(os.environ["RANK"])
        pipe = pipecompile.compile(
            Model(), 2, optimizer=adamw, verify=2, microbatches=1, loss_fn=_against
        )
        pipe.step((rows()[0], rows()[0]))
        try:
            pipe.step((rows()[rank], rows()[rank]))
        except VerifyError as error:
            return str(error)
        return ""


def _against(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return (output - batch[1].sum()).square()


def test_optimizers_that_need_more_than_they_are_given_are_found(
    gang: Callable[[int], Gang],
) -> None:
    for answer in gang(2).run(misled, optimizers.Clipping):
        assert "parameters" in answer.splitlines()[0]


def test_data_that_differs_between_stages_is_found(gang: Callable[[int], Gang]) -> None:
    for answer in gang(2).run(other_data):
        assert "step 2, loss" in answer


# -- errors ---------------------------------------------------------------------------------------


def test_where_a_difference_belongs_is_said() -> None:
    with (
        mock.patch.object(exporting, "replaced_tensors", _forgetful),
        pytest.raises(VerifyError) as caught,
    ):
        train(Replacing(), loss_fn=_squared)
    assert "differs by" in str(caught.value)
    assert "Please report it" in str(caught.value)


def test_rounding_of_what_is_zero_is_no_difference_where_rounding_may_differ() -> None:
    """The gradient of a key's bias in attention is nothing but rounding."""
    expected = {"weight": torch.ones(3), "bias": torch.tensor([1e-8, -2e-8])}
    for noise, tolerance, wrong in (
        (3e-8, 1e-3, ()),
        (3e-8, 0.0, ("bias",)),
        (1e-5, 1e-3, ("bias",)),
    ):
        report = Report(nn.Linear(3, 1), tolerance)
        report.compare(1, "gradients", expected | {"bias": torch.full((2,), noise)}, expected)
        assert report.rows[0].wrong == wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": None, "max_grad_norm": None}, "give compile\\(\\) an optimizer="),
        ({"precision": "fp16"}, "fp16"),
        ({"lr_scheduler": ReduceLROnPlateau}, "a ReduceLROnPlateau needs a metric"),
        ({"lr_scheduler": lambda _: None}, "lr_scheduler= returned None"),
        ({"verify": -1}, "verify=-1 must be at least 0"),
        ({"verify": 1.5}, "verify=1.5 must be an int"),
    ],
)
def test_what_cannot_be_compared(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train(Model(), **options)


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(OptionError, match=r"'layers\.0\.weight' has no values"):
        train(model)
