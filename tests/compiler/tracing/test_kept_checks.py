"""What a forward demands of values is demanded under stages too."""

from __future__ import annotations

from collections.abc import Callable

import pipecompile
import pytest
import torch
from pipecompile.errors import BatchError, CaptureError
from support import jobs
from support.matrix import quickly
from torch import nn
from torch.nn.functional import one_hot
from torch.torch_version import TorchVersion

CLASSES = 8
Check = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def of_one_hot(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return y + one_hot(labels, CLASSES)


def of_the_batch(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    torch._assert_async((labels < CLASSES).all(), "a label is too large")
    return y


def of_values(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Demanded on the first stage, and refused where the results are."""
    torch._assert_async((y.sum() + labels.max() < 1e3).all(), "a label is too large")
    return y


def of_tensors(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    torch._check_tensor_all(labels < CLASSES, lambda: "a label is too large")
    return y


def of_a_matrix(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return y * torch.linalg.cholesky(torch.diag(100.0 - labels) + y.square().mean()).sum()


class Demanding(nn.Module):
    def __init__(self, check: Check) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.check = check

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.second(self.check(self.first(x), labels).tanh())
        return {"loss": y.square().mean(), "y": y}


TOO_LARGE = r"a label is too large \(at .*test_kept_checks"
MESSAGES = dict.fromkeys((of_the_batch, of_values, of_tensors), TOO_LARGE) | {
    of_one_hot: "is out of range",
    of_a_matrix: r"cholesky_ex: a matrix is not positive definite \(at .*test_kept_checks",
}


@pytest.mark.parametrize("check", quickly([of_the_batch, of_a_matrix], MESSAGES))
def test_checks_refuse_a_batch(check: Check) -> None:
    x, labels = torch.randn(4, CLASSES), torch.arange(4)
    wrong = labels.clone()
    wrong[3] = 10_000
    pipe = pipecompile.compile(Demanding(check), 2, microbatches=2, optimizer=jobs.SGD)
    model = Demanding(check)
    optimizer = jobs.SGD(model.parameters())
    with pytest.raises(RuntimeError):
        model(x, wrong)
    for call in (pipe.step, pipe.evaluate, pipe.forward):
        with pytest.raises(BatchError, match=MESSAGES[check]):
            call((x, wrong))
    for _ in range(2):
        losses = [model(*pair)["loss"] for pair in zip(x.chunk(2), labels.chunk(2), strict=True)]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(pipe.step((x, labels)), torch.stack(losses).mean())
    assert all(
        torch.equal(a, b) for a, b in zip(pipe.parameters(), model.parameters(), strict=True)
    )
    y = torch.cat([model(*pair)["y"] for pair in zip(x.chunk(2), labels.chunk(2), strict=True)])
    assert torch.equal(pipe.forward((x, labels))["y"], y)


def test_a_model_without_checks_has_no_more_operators() -> None:
    pipe = pipecompile.compile(Demanding(lambda y, _: y), 1, microbatches=1, optimizer=jobs.SGD)
    pipe.step((torch.randn(4, CLASSES), torch.arange(4)))
    programs = [p for stage in pipe.programs.stages for p in stage.parts.values()]
    targets = [str(node.target) for program in programs for node in program.module.graph.nodes]
    assert not [target for target in targets if "pipecompile" in target]


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="there eigvals is one operator, which checks"
)
def test_operators_with_other_checks_are_refused_with_their_line() -> None:
    def check(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return y + torch.linalg.eigvals(y.T @ y).real

    batch = torch.randn(4, CLASSES), torch.arange(4)
    message = r"_linalg_check_errors.*, at .*test_kept_checks\.py:\d+ "
    with pytest.raises(CaptureError, match=message):
        pipecompile.compile(Demanding(check), 1, microbatches=1, example_batch=batch)
