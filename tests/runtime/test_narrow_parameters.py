"""Where parameters are cast, training is that over ``model.to(bfloat16)`` with fp32 masters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import LossScale, Precision
from pipecompile.compiler.ir.errors import OptionError
from pipecompile.compiler.ir.program import Role
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from support.narrowed import BF16, FP16, FP32, NAMED, Loop, cast, oracle
from torch import nn

MODELS = ("gpt2", "llama", "bert-mlm", "t5", "bart", "mixtral", "vit")
MATRIX = list(itertools.product(MODELS, NAMED, (1, 2, 3), ("1f1b", "zb_h1")))
QUICK = [("gpt2", "bf16_params", 3, "1f1b")]


# -- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "precision", "n_stages", "schedule"), quickly(QUICK, MATRIX))
def test_training_is_that_of_a_narrow_model(
    name: str, precision: str, n_stages: int, schedule: str
) -> None:
    found = jobs.train(name, n_stages, 1, 4, "adamw", 2, schedule, precision=precision)
    plain.assert_equal(found, oracle(name, precision))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"remat": "full"}, {"dynamic": "off"}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_recomputation_and_fixed_sizes_keep_the_bits(name: str, options: dict[str, Any]) -> None:
    found = jobs.train(name, 2, 2, 2, "adamw", 2, precision="bf16_params", **options)
    plain.assert_equal(found, oracle(name, "bf16_params", 2))


@pytest.mark.slow
@pytest.mark.parametrize("precision", NAMED)
@pytest.mark.parametrize("zero", range(4))
def test_processes_train_as_one(gang: Callable[[int], Gang], zero: int, precision: str) -> None:
    """What one process does with the same options; without ZeRO that is the narrow model."""
    options = {"precision": precision, "zero": zero}
    one = jobs.train("llama", 1, 2, 2, "adamw", 2, **options)
    for found in gang(2).run(jobs.train, "llama", 1, 2, 2, "adamw", 2, **options):
        assert all(torch.equal(a, b) for a, b in zip(found.losses, one.losses, strict=True))
        for name, value in one.params.items():
            assert torch.allclose(found.params[name], value, rtol=0, atol=1e-6), name
    expected = oracle("llama", precision, 2)
    if not zero:
        plain.assert_equal(one, expected)
    for name, value in expected.params.items():
        assert torch.allclose(one.params[name], value, atol=2.1e-2), name  # AdamW's first steps


@pytest.mark.slow
def test_stages_in_processes_train_as_one(gang: Callable[[int], Gang]) -> None:
    for found in gang(2).run(jobs.train, "gpt2", 2, 1, 4, "adamw", 2, precision="bf16_params"):
        plain.assert_equal(found, oracle("gpt2", "bf16_params"), whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5", "vit"])
def test_evaluation_is_that_of_a_narrow_model(name: str) -> None:
    pipe = jobs.pipeline(name, 2, 1, 2, precision="bf16_params")
    model = models.build(name).to(BF16).eval()
    batch = models.batches(name, 4, 1)[0]
    with torch.no_grad():
        pieces = [model(**cast(piece, BF16)) for piece in plain.cut(batch, 2)]
    assert torch.equal(pipe.evaluate(batch), torch.stack([p.loss for p in pieces]).mean())
    found = pipe.forward(batch).logits
    assert found.dtype is BF16
    assert torch.equal(found, torch.cat([p.logits for p in pieces]))


class Mixed(nn.Module):
    """Tables and averages in buffers, a tensor that is no buffer, a batch in floats."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("table", torch.randn(width))
        self.aside = torch.randn(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)) * self.table
        assert x.dtype is self.first.weight.dtype
        return (self.last(x).float() + self.aside).square().mean()


class Momentum(nn.Module):
    """A frozen copy follows the trained one, as momentum encoders do."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.trained, self.follower = nn.Linear(width, width), nn.Linear(width, width)
        self.follower.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            ours, theirs = self.follower.weight, self.trained.weight
            ours.data = ours.data * 0.75 + theirs.data * 0.25
            target = self.follower(x)
        return (self.trained(x) - target).float().square().mean()


def trained(model: nn.Module, steps: int = 2, **options: Any) -> tuple[Any, plain.Trained]:
    """A pipeline after some steps, of which loss and state are those of the narrow model."""
    islands = options.pop("islands", ())
    run = Loop(copy.deepcopy(model), jobs.SGD, islands=islands, call=lambda m, b: m(**b))
    options = {"precision": "bf16_params", "device": "cpu"} | options
    options |= {"loss_normalization": "microbatch"}
    pipe = pipecompile.compile(model, microbatches=2, optimizer=jobs.SGD, **options)
    batches = [{"x": torch.randn(8, 8)} for _ in range(steps)]
    expected = run.train(batches, 1, 2)
    found = plain.train_pipeline(pipe, batches)
    plain.assert_equal(found, expected)
    with torch.no_grad():
        pieces = [run.model.eval()(**cast(piece, BF16)) for piece in plain.cut(batches[0], 2)]
    assert torch.equal(pipe.evaluate(batches[0]), torch.stack(pieces).mean())
    return pipe, found


@pytest.mark.parametrize("kind", [Mixed, Momentum])
def test_buffers_are_read_narrow_and_held_as_they_came(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pipe, run = trained(model, n_stages=2)
    assert {n: v.dtype for n, v in run.params.items()} == {n: v.dtype for n, v in before.items()}
    if kind is Mixed:
        assert torch.equal(run.params["table"], before["table"])
        assert not torch.equal(run.params["norm.running_mean"], before["norm.running_mean"])
        constants = {
            str(port.key)
            for stage in pipe.programs.stages
            for part in stage.parts.values()
            for port in part.inputs
            if port.role is Role.CONSTANT
        }
        assert constants, "the table is cast once, and not for every microbatch"
    else:
        assert not torch.equal(run.params["follower.weight"], before["follower.weight"])


# -- islands --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [
        ("llama", "*norm", 7),
        ("llama", "*.rotary_emb", 1),
        ("mixtral", "*.gate", 2),
        ("t5", "*.wo", 4),
    ],
)
def test_islands_are_those_of_hooks_that_cast(name: str, pattern: str, count: int) -> None:
    paths = [path for path, _ in models.build(name).named_modules()]
    found = [path for path in paths if path.endswith(pattern.strip("*"))]
    assert len(found) == count
    precision = Precision(compute=BF16, params=BF16, fp32_modules=[pattern])
    trained = jobs.train(name, 2, 1, 4, "adamw", 2, precision=precision)
    plain.assert_equal(trained, oracle(name, "bf16_params", islands=tuple(found)))


class Routed(nn.Module):
    """A list of modules, one of which nests, and a table in one that has no parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())
        self.last = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = x + part(x)
        return self.last(self.inner(x)).float().square().mean()


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["inner", "inner.*"], ["inner"]),
        (["parts"], ["parts.0", "parts.1"]),
    ],
)
def test_a_module_in_fp32_has_borders(patterns: list[str], names: list[str]) -> None:
    torch.manual_seed(0)
    precision = Precision(compute=BF16, params=BF16, fp32_modules=patterns)
    pipe, _ = trained(Routed(), n_stages=1, precision=precision, islands=names)
    copied = {name for stage in pipe.programs.stages for name in stage.copies}
    assert copied
    assert not [name for name in copied if any(name.startswith(f"{each}.") for each in names)]


def test_operators_in_fp32_return_what_they_did() -> None:
    """A softmax, and a norm of which several results are read."""

    class Few(nn.Module):
        def __init__(self, wide: bool) -> None:
            super().__init__()
            self.first, self.norm, self.wide = nn.Linear(8, 8), nn.LayerNorm(8), wide

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            if self.wide:
                x = x.float().softmax(-1).to(x.dtype)
                weight, bias = self.norm.weight.float(), self.norm.bias.float()
                x = nn.functional.layer_norm(x.float(), (8,), weight, bias).to(x.dtype)
            else:
                x = self.norm(x.softmax(-1))
            return (x.float() * torch.arange(8.0)).square().mean()

    torch.manual_seed(0)
    model, wide, batch = Few(False), Few(True), torch.randn(8, 8)
    wide.load_state_dict(model.state_dict())
    found = []
    for each, fp32 in ((model, ["softmax", "layer_norm"]), (wide, []), (model, [])):
        precision = Precision(compute=BF16, params=BF16, fp32=fp32)
        pipe = pipecompile.compile(each, 1, microbatches=2, precision=precision, device="cpu")
        loss = pipe.forward_backward(batch)
        found.append([loss, *(param.grad for param in pipe.parameters())])
    assert all(map(torch.equal, found[0], found[1]))
    assert not all(map(torch.equal, found[0], found[2]))


def _compiled(name: str, **options: Any) -> Any:
    precision = Precision(compute=BF16, params=BF16, **options)
    pipe = jobs.pipeline(name, 1, 1, 2, precision=precision)
    return pipe.forward_backward(models.batches(name, 4, 1)[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Precision(compute=BF16, params=FP16), "params=torch.float16"),
        (lambda: Precision(compute=BF16, params=BF16, lower=["softmax"]), "lower=.* no effect"),
        (lambda: Precision(compute=BF16, params=BF16, table="cpu"), "table=.* no effect"),
        (lambda: Precision(compute=FP32, params=BF16), "params=torch.bfloat16"),
        (lambda: pipecompile.compile(nn.Linear(2, 2), 1, precision="fp8_params"), "bf16_params"),
        (lambda: _compiled("gpt2", fp32_modules=["head"]), "'head' stands for no module"),
        (lambda: _compiled("gpt2", fp32_modules=["lm_head"]), "name both of them, or neither"),
        (lambda: _compiled("gpt2", fp32=["mm"]), "calls no operator 'mm'; it calls .*linear"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make()


# -- masters --------------------------------------------------------------------------------------


def test_a_model_in_bf16_has_fp32_masters() -> None:
    """Steps that bf16 would round away stay in them; what is frozen stays as small as it came."""
    torch.manual_seed(0)
    model = models.Residual(3).to(BF16)
    model.layers[1].requires_grad_(False)
    pipe, run = trained(model, 3, n_stages=2)
    dtypes = {name: value.dtype for name, value in run.params.items()}
    assert {dtypes.pop(f"layers.1.{key}") for key in ("weight", "bias")} == {BF16}
    assert set(dtypes.values()) == {FP32}
    assert any(not torch.equal(run.params[n], run.params[n].to(BF16).float()) for n in dtypes)
    states = pipe.optimizer.state.values()
    assert {v.dtype for state in states for v in state.values() if torch.is_tensor(v)} <= {FP32}
    model.load_state_dict(pipe.state_dict(), strict=True)


@pytest.mark.slow
def test_an_overflow_of_fp16_is_skipped() -> None:
    batches = models.batches("gpt2", 8, 3)
    optimizer = jobs.OPTIMIZERS["adamw"]
    run = Loop(models.build("gpt2"), optimizer, FP16, init_scale=2.0**40)
    scaling = LossScale(init=2.0**40)
    precision = Precision(compute=FP16, params=FP16, loss_scale=scaling)
    pipe = jobs.pipeline("gpt2", 2, 1, 4, precision=precision)
    expected, found = run.train(batches, 1, 4), plain.train_pipeline(pipe, batches)
    assert expected.grads[0] == {}
    plain.assert_equal(found, expected)
    assert pipe.loss_scaler.scale == run.scaler.get_scale()


@pytest.mark.parametrize("precision", quickly(["bf16_params"], NAMED))
def test_checkpoints_open_under_any_precision(precision: str, tmp_path: Path) -> None:
    def compiled(given: str | None, n_stages: int) -> Any:
        torch.manual_seed(0)
        model, adamw = models.Residual(3), jobs.OPTIMIZERS["adamw"]
        return pipecompile.compile(
            model, n_stages, microbatches=2, optimizer=adamw, precision=given, device="cpu"
        )

    torch.manual_seed(1)
    batches = [torch.randn(8, 8) for _ in range(3)]
    for first, second in ((precision, None), (None, precision), (precision, precision)):
        pipe, other = compiled(first, 2), compiled(second, 1)
        for batch in batches[:2]:
            pipe.step(batch)
        other.compile_for(batches[0])
        other.load(pipe.save(str(tmp_path / f"{first}-{second}")))
        assert plain.equal(other.state_dict(), pipe.state_dict())
        assert {value.dtype for value in other.state_dict().values()} == {FP32}
        if first == second:
            assert torch.equal(other.step(batches[2]), pipe.step(batches[2]))
            assert plain.equal(other.state_dict(), pipe.state_dict())


@pytest.mark.slow
def test_the_first_steps_are_compared_with_a_narrow_model() -> None:
    precision = Precision(compute=BF16, params=BF16, fp32_modules=["norm"])
    torch.manual_seed(0)
    pipe = pipecompile.compile(
        Mixed(),
        2,
        microbatches=1,
        optimizer=jobs.OPTIMIZERS["adamw"],
        max_grad_norm=0.1,
        precision=precision,
        verify=2,
        device="cpu",
    )
    for _ in range(3):
        pipe.step(torch.randn(8, 8))
    lines = pipe.verification.splitlines()
    assert {line.split()[2] for line in lines} >= {"loss", "gradients", "parameters", "buffers"}
    assert all(line.endswith("identical to the last bit") for line in lines)


# -- what it saves --------------------------------------------------------------------------------


def test_what_is_kept_and_sent_is_narrow() -> None:
    batch = {"x": torch.randn(8, 8)}
    plans = {}
    for precision in (None, "bf16", "bf16_params"):
        pipe = pipecompile.compile(
            models.Residual(3), 2, microbatches=4, precision=precision, example_batch=batch
        )
        plans[precision] = pipe.plan
    pipe.forward_backward(batch)
    values = [value for message in pipe.programs.messages for value in message.values]
    assert {value.dtype for value in values} == {BF16}
    assert plans["bf16_params"].options["precision"] == "bf16_params"
    sent = {k: sum(t.bytes for s in p.stages for t in s.sends) for k, p in plans.items()}
    stash = {k: sum(s.stash_bytes for s in p.stages) for k, p in plans.items()}
    assert 2 * sent["bf16_params"] == sent[None]
    assert stash["bf16_params"] < 0.6 * stash[None]
    assert stash["bf16_params"] < stash["bf16"]
    ranks = pipe._session.state.ranks.values()
    assert {c.dtype for rank in ranks for c in rank.copies.values()} == {BF16}
    assert {s.tensor.dtype for rank in ranks for s in rank.grads.slots.values()} == {FP32}
    copied = {name for rank in ranks for name in rank.copies}
    assert copied == set(dict(pipe.named_parameters()))


@pytest.mark.parametrize("name", quickly(["gpt2"], ["gpt2", "llama-deep"]))
def test_what_replicas_fetch_is_narrow(name: str) -> None:
    pipe = jobs.pipeline(name, 1, 2, 2, zero=3, precision="bf16_params")
    pipe.compile_for(models.batches(name, 8, 1)[0])
    roles = {port.role for group in pipe.programs.stages[0].groups for port in group}
    assert roles == {Role.COPY}


@pytest.mark.slow
def test_parts_that_run_eagerly_are_given_what_is_narrow() -> None:
    torch.manual_seed(0)
    options = {"eager_modules": ["layers.*"], "n_stages": 2}
    trained(models.Residual(3), **options)
    precision = Precision(compute=BF16, params=BF16, fp32_modules=["layers.1"])
    trained(models.Residual(3), precision=precision, islands=["layers.1"], **options)


@pytest.mark.slow
def test_batches_of_many_lengths_share_what_was_traced() -> None:
    pipe = jobs.pipeline("llama", 2, 1, 2, precision="bf16_params")
    run = Loop(models.build("llama"), jobs.OPTIMIZERS["adamw"])
    torch.manual_seed(3)
    batches = [models.tokens(4, length) for length in (6, 10, 8, 12)]
    plain.assert_equal(plain.train_pipeline(pipe, batches), run.train(batches, 1, 2))


def test_a_loss_module_stays_as_it_is() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
            assert self.scale.dtype is FP32
            assert batch["target"].dtype is FP32
            return (output.float() * self.scale - batch["target"]).square().mean()

    torch.manual_seed(0)
    model, loss_fn = nn.Linear(8, 8), Scaled()
    batch = {"input": torch.randn(8, 8), "target": torch.randn(8, 8)}
    compiled = partial(pipecompile.compile, microbatches=1, device="cpu", loss_fn=loss_fn)
    pipe = compiled(model, 1, precision="bf16_params")
    loss, found = pipe.forward_backward(batch), pipe.forward({"input": batch["input"]})
    output = copy.deepcopy(model).to(BF16)(batch["input"].to(BF16))
    assert torch.equal(loss, loss_fn(output, batch).detach())
    assert torch.equal(found, output)


def test_terms_of_a_loss_are_weighed_in_fp32_and_stay_narrow() -> None:
    """Each by a number of its own, as labels and rows count differently in microbatches."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head, self.other = nn.Embedding(9, 8), nn.Linear(8, 9), nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x = self.words(ids)
            loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
            return loss + nn.functional.cross_entropy(self.other(x[:, 0]), labels[:, 0] % 4)

    torch.manual_seed(0)
    model = Heads().to(BF16)
    batch = {"ids": torch.randint(9, (8, 6)), "labels": torch.randint(9, (8, 6))}
    pipe = pipecompile.compile(copy.deepcopy(model), 1, microbatches=2, device="cpu")
    loss, losses = pipe.forward_backward(batch), []
    for piece in plain.cut(batch, 2):
        losses.append(model(**piece))
        (losses[-1] / 2).backward()
    assert torch.equal(loss, torch.stack(losses).mean().detach())
    for name, param in pipe.named_parameters():
        assert torch.equal(param.grad, model.get_parameter(name).grad), name
