"""One model trained twice, under stages and plainly, and what differs: nothing, bit for bit.

Two clipped steps of momentum SGD on two microbatches each, then an evaluation. Compared are losses,
gradients, global norms, and afterwards all parameters, buffers and the evaluation's loss.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..api import compile
from ..ir.errors import PipecompileError
from .families import Architecture
from .subjects import Batch, Subject, subject_of

RIGHT, REFUSED, CLOSE, DIFFERENT, FAILED, TIMEOUT, NO_EAGER = OUTCOMES = (
    "right",  # every bit is equal
    "refused",  # by an error of pipecompile's own
    "close",  # no number differs by more than NEAR
    "different",  # silently
    "failed",  # by another error
    "timeout",
    "no eager",  # it cannot be built, or does not train plainly: nothing to compare with
)
NEAR = 1e-5

MICROBATCHES, STEPS = 2, 2
MAX_NORM = 0.002  # small enough to clip every step
SEED = 0

Values = dict[str, torch.Tensor]  # losses, gradients and so on by their names


@dataclass(frozen=True)
class Outcome:
    """What came of an architecture.

    Attributes:
        outcome: one of `OUTCOMES`.
        reason: of what is not right, one line.
        difference: the largest, where numbers differ.
    """

    family: str
    name: str
    outcome: str
    reason: str = ""
    difference: float | None = None
    parameters: int = 0
    seconds: float = 0.0

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.family, self.name)


class _NotPlainError(Exception):
    """A model for which plain training is nothing to compare with."""


def try_out(
    architecture: Architecture,
    stages: int,
    make: Callable[[Architecture], Subject] = subject_of,
    train: Callable[..., Values] | None = None,
) -> Outcome:
    """Train it both ways; no exception leaves.

    Args:
        make: the model and its batches.
        train: as `train_pipeline`.
    """
    begun = time.perf_counter()
    found = partial(Outcome, architecture.family, architecture.name)
    try:
        model, batches, expected = _plainly(architecture, make)
    except Exception as error:
        return found(NO_EAGER, said(error), seconds=time.perf_counter() - begun)
    parameters = sum(p.numel() for p in model.parameters())
    outcome, reason, difference = _outcome(model, batches, expected, stages, train)
    seconds = round(time.perf_counter() - begun, 2)
    return found(outcome, reason, difference, parameters, seconds)


def _plainly(
    architecture: Architecture, make: Callable[[Architecture], Subject]
) -> tuple[nn.Module, list[Batch], Values]:
    torch.manual_seed(SEED)
    subject = make(architecture)
    batches = [subject.batch() for _ in range(STEPS + 1)]
    model = subject.model.train()
    expected = train_plainly(copy.deepcopy(model), batches)
    if differing(train_plainly(copy.deepcopy(model), batches), expected):
        raise _NotPlainError("two plain runs differ: it draws random numbers")
    for name, value in expected.items():
        if name.startswith(("loss", "norm")) and not value.isfinite():
            raise _NotPlainError(f"{name} is not finite")
        if name.startswith("norm") and value <= MAX_NORM:
            raise _NotPlainError(f"{name} is too small to be clipped")
    return model, batches, expected


def _outcome(
    model: nn.Module,
    batches: list[Batch],
    expected: Values,
    stages: int,
    train: Callable[..., Values] | None,
) -> tuple[str, str, float | None]:
    try:
        found = (train or train_pipeline)(model, batches, stages)
    except PipecompileError as error:
        return REFUSED, said(error), None
    except Exception as error:
        return FAILED, said(error), None
    names = differing(found, expected)
    if not names:
        return RIGHT, "", None
    missing = found.keys() ^ expected.keys()
    largest = max(map(partial(_difference, found, expected), names))
    outcome = CLOSE if largest <= NEAR and not missing else DIFFERENT
    shown = f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
    return outcome, f"{len(names)} of {len(expected)} differ: {shown}", largest


def train_plainly(model: nn.Module, batches: list[Batch]) -> Values:
    """Gradient accumulation as a textbook writes it; the last batch is for the evaluation."""
    optimizer = _optimizer(model.parameters())
    found: Values = {}
    for step, batch in enumerate(batches[:-1]):
        losses = []
        for piece in _pieces(batch):
            loss = _loss(model(**piece))
            torch.autograd.backward(loss / MICROBATCHES)
            losses.append(loss.detach())
        named = {name: p.grad for name, p in model.named_parameters()}
        found |= _of_step(step, torch.stack(losses).mean(), named)
        parameters = list(model.parameters())
        found[f"norm {step}"] = nn.utils.clip_grad_norm_(parameters, MAX_NORM).clone()
        optimizer.step()
        optimizer.zero_grad()
    found |= _state(model.state_dict())
    model.eval()
    with torch.no_grad():
        losses = [_loss(model(**piece)) for piece in _pieces(batches[-1])]
    return found | {"evaluation": torch.stack(losses).mean()}


def train_pipeline(model: nn.Module, batches: list[Batch], stages: int) -> Values:
    """The same under stages."""
    pipe = compile(model, stages, 1, microbatches=MICROBATCHES, optimizer=_optimizer)
    found: Values = {}
    for step, batch in enumerate(batches[:-1]):
        loss = pipe.forward_backward(batch)
        found |= _of_step(step, loss, {name: p.grad for name, p in pipe.named_parameters()})
        found[f"norm {step}"] = pipe.clip_grad_norm_(MAX_NORM).clone()
        pipe.optimizer.step()
        pipe.zero_grad()
    found |= _state(pipe.state_dict())
    return found | {"evaluation": pipe.evaluate(batches[-1]).clone()}


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _pieces(batch: Batch) -> list[Batch]:
    cut = {key: value.chunk(MICROBATCHES) for key, value in batch.items()}
    return [{key: parts[i] for key, parts in cut.items()} for i in range(MICROBATCHES)]


def _loss(output: Any) -> torch.Tensor:
    loss = output.get("loss")
    if not isinstance(loss, torch.Tensor):
        raise _NotPlainError("it returns no loss")
    return loss


def _of_step(step: int, loss: torch.Tensor, grads: Mapping[str, torch.Tensor | None]) -> Values:
    found = {f"loss {step}": loss.clone()}
    return found | {f"grad {step} {n}": g.clone() for n, g in grads.items() if g is not None}


def _state(state: Mapping[str, Any]) -> Values:
    return {f"state {n}": v.clone() for n, v in state.items() if isinstance(v, torch.Tensor)}


def differing(found: Values, expected: Values) -> list[str]:
    """The names under which one of them has other bits, or nothing."""
    shared = found.keys() & expected.keys()
    equal = {name for name in shared if torch.equal(found[name], expected[name])}
    return [name for name in {**expected, **found} if name not in equal]


def _difference(found: Values, expected: Values, name: str) -> float:
    if name not in found or name not in expected:
        return float("inf")
    a, b = found[name], expected[name]
    if a.shape != b.shape or not a.numel():
        return float("inf")
    largest = (a.double() - b.double()).abs().max().item()
    return largest if largest == largest else float("inf")


def said(error: BaseException) -> str:
    """An error in one line; one that is not ours with its class and place."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, PipecompileError | _NotPlainError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno})"
    return f"{type(error).__name__}: {text}{place if frames else ''}"
