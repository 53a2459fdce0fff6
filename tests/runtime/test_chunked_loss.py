"""chunked_loss=: the same training up to rounding, with less memory where it is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir.errors import (
    BatchError,
    MemoryBudgetError,
    OptionError,
    PlanError,
)
from pipecompile.compiler.losses import pieces as ops
from pipecompile.compiler.memory.meter import StorageMeter
from support import jobs, measured, models
from support.matrix import quickly
from torch import nn
from torch.nn.functional import cross_entropy

BOUND = {"fp32": 5e-6, "bf16": 5e-2}
"""Of losses and gradients, relative to the largest value of a tensor."""
ROWS = 5  # divides no number of tokens here
RAW = {ops.FORWARD: ops.chunked_loss, ops.BACKWARD: ops.chunked_loss_backward}


class Own(nn.Module):
    """A loss of the user's own, over a table that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(models.VOCABULARY, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits = 8 * torch.tanh((x @ self.table.weight.T) / 8)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Own() if name == "own" else models.build(name)


def uneven(name: str, rows: int = 8) -> models.Batch:
    """Labels of which microbatches keep different numbers."""
    batch = models.batches("gpt2" if name == "own" else name, rows, 1)[0]
    batch["labels"][::3, 4:] = -100
    batch["labels"][0] = -100
    return batch


def pipeline(name: str, batch: models.Batch, **options: Any) -> Any:
    given: dict[str, Any] = {"n_stages": 2, "microbatches": 2, "optimizer": jobs.SGD} | options
    return pipecompile.compile(built(name), example_batch=batch, **given)


def results(pipe: Any, batch: models.Batch) -> dict[str, torch.Tensor]:
    """Loss and gradients of a batch, its loss in evaluation, and what forward returns."""
    found = {"loss": pipe.forward_backward(batch).clone()}
    found |= {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}
    found["evaluation"] = pipe.evaluate(batch)
    output = pipe.forward(batch)
    found["logits"] = output["logits"] if isinstance(output, dict) else output.logits
    return found


def assert_close(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], by: float) -> None:
    assert set(found) == set(whole)
    assert torch.equal(found["logits"], whole["logits"])
    largest = max(value.double().abs().max() for value in whole.values())
    for name, value in whole.items():
        difference = (found[name].double() - value.double()).abs().max()
        size = value.double().abs().max()
        if name.endswith(("key.bias", "k_proj.bias")):  # a softmax does not see it: rounding alone
            assert size < 1e-6 * largest
            size = 1e-6 * largest
        assert difference <= by * size, name


NAMES = ("gpt2", "llama", "bert-mlm", "t5", "bart", "own")
WAYS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "zb_h1": {"schedule": "zb_h1", "n_stages": 3},
    "bf16": {"precision": "bf16"},
    "bf16_params": {"precision": "bf16_params"},
    "dp": {"dp": 2, "zero": 2},
    "zero3": {"dp": 2, "zero": 3, "remat": "full"},
    "per_step": {"tied_grads": "per_step"},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "one": {"n_stages": 1},
}
QUICK = [("own", "zb_h1")]


@pytest.mark.parametrize(
    ("name", "way"), quickly(QUICK, [(name, way) for name in NAMES for way in WAYS])
)
def test_losses_and_gradients_are_those_of_whole_logits(name: str, way: str) -> None:
    batch, options = uneven(name), WAYS[way]
    whole = results(pipeline(name, batch, **options), batch)
    pipe = pipeline(name, batch, chunked_loss=ROWS, **options)
    assert_close(results(pipe, batch), whole, BOUND["bf16" if "bf16" in way else "fp32"])
    assert pipe.plan.decision.chunk_rows == ROWS


def test_logits_never_exist_and_weight_gradients_stay_in_w() -> None:
    batch = models.tokens(4)
    pipe = pipeline("llama", batch, schedule="zb_h1", n_stages=2, chunked_loss=ROWS)
    (stage,) = [s for s in pipe.compiled.program.stages if s.weight and s.stage == 1]
    for part, wants in (
        (stage.backward, [True, False, False]),
        (stage.weight, [False, True, True]),
    ):
        nodes = part.module.graph.find_nodes(op="call_function", target=ops.BACKWARD)
        assert [list(node.args[-1]) for node in nodes] == [[wants[0], wants[1], False]]
    for program in stage.parts.values():
        for node in program.module.graph.nodes:
            value = node.meta.get("val")
            wide = isinstance(value, torch.Tensor) and value.shape[-1:] == (models.VOCABULARY,)
            assert not wide, node


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["head", "body"])
def test_a_part_may_be_frozen(frozen: str) -> None:
    batch = uneven("llama")

    def freeze(model: Any) -> Any:
        for name, param in model.named_parameters():
            param.requires_grad_((name == "lm_head.weight") == (frozen == "body"))
        return model

    made = [
        pipecompile.compile(
            freeze(built("llama")), 2, microbatches=2, example_batch=batch, chunked_loss=rows
        )
        for rows in ("off", ROWS)
    ]
    whole, pieces = (results(pipe, batch) for pipe in made)
    assert ("lm_head.weight" in pieces) == (frozen == "body")
    assert_close(pieces, whole, BOUND["fp32"])


@pytest.mark.slow
def test_fp16_scales_its_gradients_through_pieces() -> None:
    batch = uneven("gpt2")
    for precision in ("fp16", "fp16_params"):
        options = {"precision": precision, "optimizer": jobs.SGD}
        whole = results(pipeline("gpt2", batch, **options), batch)
        pieces = results(pipeline("gpt2", batch, chunked_loss=ROWS, **options), batch)
        assert_close(pieces, whole, BOUND["bf16"])


@pytest.mark.slow
def test_lengths_may_vary() -> None:
    pipes = [pipeline("gpt2", models.tokens(4), chunked_loss=rows) for rows in ("off", ROWS)]
    for length in (12, 10, 9, 7):
        torch.manual_seed(length)
        batch = models.tokens(4, length)
        whole, pieces = (pipe.forward_backward(batch).clone() for pipe in pipes)
        torch.testing.assert_close(pieces, whole)
        for pipe in pipes:
            pipe.zero_grad()
    notes = [
        note for loaded in pipes[1]._session.loaded.values() for note in loaded.compiled.plan.notes
    ]
    assert any("follows from one graph" in text for _, text in notes)


@pytest.mark.slow
def test_verifying_allows_what_pieces_round() -> None:
    batch = uneven("bert-mlm", 8)
    batch["labels"] = models.padded(8)["input_ids"]  # all microbatches keep as many
    pipe = pipeline("bert-mlm", batch, chunked_loss=ROWS, verify=1)
    pipe.step(batch)
    assert "chunked_loss=5" in pipe.verification


@pytest.mark.slow
def test_verifying_allows_nothing_where_auto_keeps_logits() -> None:
    batch = models.tokens(4)
    pipe = pipeline("gpt2", batch, n_stages=1, chunked_loss="auto", verify=1)
    pipe.step(batch)
    assert pipe.plan.decision.chunk_rows == 0
    assert "allowed" not in pipe.verification


@pytest.mark.slow
def test_what_a_trainer_counts_divides_the_loss() -> None:
    """transformers then adds up and divides by its number, as its Trainer asks for."""
    batch = uneven("llama") | {"num_items_in_batch": torch.tensor(40)}
    given = {"loss_normalization": "microbatch"}
    whole = results(pipeline("llama", batch, **given), batch)
    pipe = pipeline("llama", batch, chunked_loss=ROWS, **given)
    assert_close(results(pipe, batch), whole, BOUND["fp32"])


class Parts(nn.Module):
    """A head and a loss that are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 90)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.body(x).tanh())
        result: torch.Tensor = self.loss(scores, labels)
        return result


def test_a_loss_goes_where_its_head_is_pinned() -> None:
    """And a module of which nothing is left cannot be pinned."""
    batch = {"x": torch.randn(8, 8), "labels": torch.arange(8)}

    def made(pin: dict[str, int], stages: int = 2) -> Any:
        given = {"example_batch": batch, "chunked_loss": ROWS, "microbatches": 2}
        return pipecompile.compile(Parts(), stages, pin=pin, **given)

    pipe = made({"head": 0}, 1)
    assert pipe.plan.stages[0].modules
    with pytest.raises(OptionError, match=r"pin=.*loss"):
        made({"loss": 1})


@pytest.mark.slow
def test_a_label_that_is_no_class_is_one_clear_error() -> None:
    batch = models.tokens(4)
    pipe = pipeline("llama", batch, chunked_loss=ROWS)
    batch["labels"][1, 3] = models.VOCABULARY
    with pytest.raises(BatchError, match=r"a label or another index .* for 96 classes"):
        pipe.step(batch)


# -- what is refused, and said ----------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -3, True, 2.5, "some", None, "512"])
def test_nonsense_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r'chunked_loss=.*: use "off", "auto", or a number'):
        pipecompile.compile(nn.Linear(2, 2), 1, chunked_loss=value)


def test_a_number_for_a_loss_that_needs_its_logits_is_refused() -> None:
    with pytest.raises(OptionError, match=r"chunked_loss=8: .*no cross_entropy"):
        pipecompile.compile(models.Residual(2), 1, example_batch=torch.ones(4, 8), chunked_loss=8)


@pytest.mark.slow
def test_a_plan_decides_and_keeps_it(tmp_path: Path) -> None:
    batch = models.tokens(4)
    plan = pipeline("llama", batch, chunked_loss=ROWS).plan
    assert any("for logits at a time" in note for _, note in plan.notes)
    again = pipeline("llama", batch, chunked_loss=ROWS, plan=plan)
    assert again.plan.decision.chunk_rows == ROWS
    with pytest.raises(PlanError, match="chunked_loss=5"):
        pipeline("llama", batch, plan=plan)


# -- memory -----------------------------------------------------------------------------------


def wide(name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    config = {"vocab_size": 8192, "num_hidden_layers": 2}
    return models.llama(**config) if name == "llama" else models.gpt2(n_layer=2, vocab_size=8192)


def pipe_of(name: str, batch: models.Batch, **options: Any) -> Any:
    given: dict[str, Any] = {"microbatches": 2, "optimizer": jobs.SGD} | options
    return pipecompile.compile(wide(name), example_batch=batch, **given)


class Inside(StorageMeter):
    """Sees what losses in pieces allocate, too."""

    def __init__(self) -> None:
        super().__init__(self._run)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in RAW:
            return func(*args, **kwargs)
        with self:
            return cast(Any, RAW[func])._init_fn(*args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        pytest.param("gpt2", {"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param("gpt2", {"precision": "bf16_params"}, marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_the_measured_one(name: str, options: dict[str, Any]) -> None:
    """And far from that of whole logits."""
    batch = models.tokens(4, 32)
    peaks = {}
    for rows in ("off", 8):
        pipe = pipe_of(name, batch, n_stages=1, chunked_loss=rows, **options)
        pipe.step(batch)
        meter = Inside()
        meter.hold(measured.held(pipe, batch))
        with meter:
            pipe.step(batch)
        peaks[rows] = meter.peak_bytes
        assert pipe.plan.stages[0].memory.peak == pytest.approx(meter.peak_bytes, rel=0.03)
    assert peaks["off"] - peaks[8] > 1.2 * 2 * 32 * 8192 * 4


@pytest.mark.slow
def test_auto_keeps_whole_logits_where_they_cost_nothing() -> None:
    batch = models.tokens(4, 32)
    pipe = pipe_of("llama", batch, n_stages=2, chunked_loss="auto")
    assert pipe.plan.decision.chunk_rows == 0
    assert any("nothing is given up" in note for _, note in pipe.plan.notes)


@pytest.mark.slow
def test_auto_takes_pieces_where_whole_logits_do_not_fit(tmp_path: Path) -> None:
    batch = models.tokens(4, 32)
    pieces = pipe_of("llama", batch, n_stages=2, chunked_loss=4096).plan
    least = max(stage.memory.peak for stage in pieces.stages)
    whole = pipe_of("llama", batch, n_stages=2).plan
    assert least < max(stage.memory.peak for stage in whole.stages)
    with pytest.raises(MemoryBudgetError):
        pipe_of("llama", batch, n_stages=2, memory=f"{least + 4096} B")
    pipe = pipe_of("llama", batch, n_stages=2, memory=f"{least + 4096} B", chunked_loss="auto")
    assert pipe.plan.decision.chunk_rows == 4096  # as many as have 2²⁵ logits
    assert any("whole logits do not fit" in note for _, note in pipe.plan.notes)
    assert torch.isfinite(pipe.step(batch))
    assert torch.isfinite(pipe.evaluate(batch))
    again = pipe_of("llama", batch, n_stages=2, chunked_loss="auto", plan=pipe.plan)
    assert again.plan.decision.chunk_rows == 4096


def test_auto_says_why_it_helps_nothing() -> None:
    pipe = pipecompile.compile(
        models.Residual(4), 2, example_batch=torch.ones(8, 8), chunked_loss="auto", remat="full"
    )
    assert any("no cross_entropy" in note for _, note in pipe.plan.notes)
