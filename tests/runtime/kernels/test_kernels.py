"""Fusions compiled by Inductor: equal up to rounding, and clear where they cannot be."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir.errors import BackendError, BatchError, OptionError
from pipecompile.compiler.ir.program import FUSION, fusions_of
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.runtime.kernels import choice, kernels
from support import jobs, models, plain
from support.fused import calls, interpreted, programs
from support.gang import Gang
from support.matrix import quickly
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

CLOSE = {None: 1e-5, "bf16": 2e-2}
"""By precision: how far losses may be apart, and gradients, relative to the largest of a tensor."""
APART = {None: 1e-3, "bf16": 4e-2}
"""By precision: how far curves may be apart, relative to where they begin. That of eager kernels in
bf16 is 2e-2 from that in fp32."""


def options(**given: Any) -> CompileOptions:
    return CompileOptions(n_stages=1, **given)


# -- which backend ---------------------------------------------------------------------------------


def test_a_machine_without_a_compiler_is_told_before_anything_starts() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("/nowhere/c++",)}):
        with pytest.raises(BackendError, match=r'backend="inductor".*no C\+\+ compiler.*"eager"'):
            pipecompile.compile(models.Residual(2), 1, backend="inductor", device="cpu")
        assert choice.settled(options(), torch.device("cpu"))[0].backend == "eager"


def test_auto_is_eager_on_the_cpu_and_where_triton_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipecompile.runtime.kernels import inductor

    assert choice.settled(options(), torch.device("cpu"))[0].backend == "eager"
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(inductor, "lacking", lambda kind: "")
    assert choice.settled(options(), cuda)[0].backend == "inductor"
    assert choice.settled(options(backend="eager"), cuda)[0].backend == "eager"
    monkeypatch.setattr(inductor, "lacking", lambda kind: "Triton is not installed")
    found, note = choice.settled(options(), cuda)
    assert (found.backend, note) == ("eager", "eager kernels, as Triton is not installed")


def test_a_note_of_what_was_chosen_stands_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipecompile.runtime import start

    note = "eager kernels, as there is no Triton"
    monkeypatch.setattr(start, "settled", lambda given, _: (replace(given, backend="eager"), note))
    pipe = pipecompile.compile(models.Residual(2), 1, example_batch=torch.ones(4, 8))
    assert dict(pipe.plan.notes)["backend"] == note
    assert pipe.compiled.fused is None


def test_triton_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipecompile.runtime.kernels import inductor

    monkeypatch.setattr(inductor, "has_triton", lambda: True)
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert inductor.lacking("cuda") == "Triton finds no C compiler (gcc or clang, or what CC names)"
    monkeypatch.setenv("CC", sys.executable)
    assert inductor.lacking("cuda") == ""


@pytest.mark.parametrize("given", ["indutor", "", 1, None])
def test_other_backends_are_refused(given: Any) -> None:
    with pytest.raises(OptionError, match=r"backend=.*'auto' or 'eager' or 'inductor'"):
        options(backend=given)


# -- kernels ---------------------------------------------------------------------------------------


def fusion() -> fx.GraphModule:
    """One of a small model, with its result (4, 8)."""
    with interpreted():
        pipe = pipecompile.compile(
            models.Residual(2), 1, example_batch=torch.ones(4, 8), backend="inductor"
        )
    found: Any = next(iter(fusions_of(programs(pipe)["0F"]).values()))
    return found


def test_results_have_the_strides_that_were_traced() -> None:
    module = fusion()
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    given = [torch.randn(value.shape) for value in inputs]
    expected = module.forward(list(given))

    def turned(boxed: list[torch.Tensor]) -> list[torch.Tensor]:
        made = module.forward(boxed)
        return [t.t().contiguous().t() if t.dim() == 2 else t for t in made]

    kernel = kernels.Kernel(turned, module)
    for _ in range(2):
        found = kernel(list(given))
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.stride() == theirs.stride()
    plain_ = kernels.Kernel(module.forward, module)
    assert plain_(list(given))[0].stride() == expected[0].stride()


def test_kernels_end_with_the_programs_that_call_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipecompile.runtime.kernels import inductor

    known: WeakValueDictionary[Any, Any] = WeakValueDictionary()
    monkeypatch.setattr(inductor, "compile_fusion", lambda fusion, _: fusion.forward)
    monkeypatch.setattr(kernels, "_known", known)
    pipe = jobs.pipeline("gpt2", 1, 1, 2, backend="inductor")
    pipe.compile_for(models.batches("gpt2", 4, 1)[0])
    names = {name for program in programs(pipe).values() for name in fusions_of(program)}
    assert {name for name, *_ in known} == names
    assert len(known) == len(names) > 0
    del pipe
    gc.collect()
    assert not known


def test_results_stay_whatever_is_set_for_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a CUDA graph would be written over by the next microbatch."""
    from pipecompile.runtime.kernels import inductor

    found = []

    def compiled(traced: fx.GraphModule, *_: Any, **__: Any) -> Any:
        found.append(inductor.config.triton.cudagraphs)

    monkeypatch.setattr(inductor, "compile_fx_inner", compiled)
    with inductor.config.patch({"triton.cudagraphs": True}):
        inductor.compile_fusion(fusion(), torch.device("cpu"))
    assert found == [False]


def test_a_fusion_that_cannot_be_compiled_is_named_with_its_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipecompile.runtime.kernels import inductor

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(inductor, "compile_fusion", fails)
    monkeypatch.setattr(kernels, "_known", WeakValueDictionary())
    with pytest.raises(BackendError, match=r"layers.*fusion_\w+.*no such instruction.*eager"):
        pipecompile.compile(
            models.Residual(2), 1, example_batch=torch.ones(4, 8), backend="inductor"
        )


def test_an_error_in_a_fusion_names_its_module() -> None:
    class Failing(nn.Module):
        def __init__(self, _: nn.Module) -> None:
            super().__init__()

        def forward(self, boxed: Any) -> Any:
            raise RuntimeError("out of memory")

    with interpreted(Failing):
        pipe = jobs.pipeline("gpt2", 1, 1, 2, backend="inductor")
        with pytest.raises(RuntimeError, match="out of memory") as caught:
            pipe.forward_backward(models.batches("gpt2", 4, 1)[0])
    (note,) = [n for n in caught.value.__notes__ if "module" in n]
    assert "0F0, module 'transformer.h.0' (fusion_" in note


def test_a_token_out_of_range_is_told_as_by_eager_kernels() -> None:
    batch = models.batches("gpt2", 4, 1)[0]
    wrong = {key: value.clone() for key, value in batch.items()}
    wrong["input_ids"][0, 0] = models.VOCABULARY
    told = []
    for backend in ("eager", "inductor"):
        with interpreted():
            pipe = jobs.pipeline("gpt2", 2, 1, 2, backend=backend)
            with pytest.raises(BatchError) as caught:
                pipe.forward_backward(wrong)
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_weights_gradient_is_made_in_the_layout_of_its_sum(cast: bool, turned: bool) -> None:
    from pipecompile.runtime.kernels.inductor import _in_rows

    def gradient(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        made = torch.permute(torch.mm(torch.permute(x, [1, 0]) if turned else x, g), [1, 0])
        return torch.ops.prims.convert_element_type.default(made, torch.float64) if cast else made

    g, x = torch.randn(6, 3), torch.randn(6, 4) if turned else torch.randn(4, 6)
    module = make_fx(gradient)(g, x)
    expected = module(g, x)
    (output,) = module.graph.find_nodes(op="output")
    _in_rows(output.args[0])
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(g, x), expected)
    assert module(g, x).is_contiguous()
    assert not expected.is_contiguous()
    assert len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 1


# -- Inductor --------------------------------------------------------------------------------------


def worst(found: plain.Trained, expected: plain.Trained) -> float:
    """The largest difference of losses and gradients, relative to the largest of a tensor."""
    pairs = list(zip(found.losses, expected.losses, strict=True))
    for mine, theirs in zip(found.grads, expected.grads, strict=True):
        assert set(mine) == set(theirs)
        pairs += [(mine[name], theirs[name]) for name in mine]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


@pytest.mark.slow
def test_a_step_is_that_of_eager_kernels_up_to_rounding() -> None:
    """Two stages: what they send has the strides that are expected."""
    runs = []
    for backend in ("eager", "inductor"):
        torch.manual_seed(0)
        model = models.Residual(4)
        pipe = pipecompile.compile(
            model, 2, microbatches=2, optimizer=jobs.SGD, backend=backend, device="cpu"
        )
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        runs.append(([pipe.step(x) for _ in range(3)], pipe.state_dict()))
        if backend == "inductor":
            assert any(calls(program) for program in programs(pipe).values())
    (losses, state), (fused_losses, fused_state) = runs
    torch.testing.assert_close(fused_losses, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_state, state, rtol=1e-5, atol=1e-6)


CASES: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = [
    ("gpt2", (2, 1, 2), {}),
    ("gpt2", (2, 1, 2), {"precision": "bf16"}),
    ("llama", (2, 1, 2), {"schedule": "zb_h1", "remat": "full"}),
    ("llama", (2, 1, 2), {"precision": "bf16", "remat": "full"}),
    ("bert-mlm", (1, 2, 2), {"zero": 3}),
    ("bert-mlm", (1, 1, 2), {"precision": "bf16"}),
    ("t5", (2, 1, 2), {}),
    ("mixtral", (1, 1, 2), {}),
    ("vit", (1, 1, 2), {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "options"), CASES)
def test_models_differ_by_rounding_alone(
    name: str, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    run = partial(jobs.train, name, *shape, "sgd", 1, **options)
    assert worst(run(backend="inductor"), run()) < CLOSE[options.get("precision")]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_two_hundred_steps_side_by_side(precision: str | None) -> None:
    """The same curve: rounding does not add up to another training."""
    curves = []
    batches = models.batches("gpt2", 4, 4)
    for backend in ("eager", "inductor"):
        pipe = jobs.pipeline("gpt2", 2, 1, 2, backend=backend, precision=precision)
        curves.append(torch.stack([pipe.step(batches[i % 4]) for i in range(200)]))
    eager, fused = (curve.view(20, 10).mean(1) for curve in curves)
    assert eager[-1] < eager[0] / 2  # it learns them
    assert (fused - eager).abs().max() < APART[precision] * eager[0]
    torch.testing.assert_close(fused[-5:], eager[-5:], rtol=APART[precision], atol=0.0)


@pytest.mark.slow
def test_replicas_compile_a_fusion_once(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    """One of the processes; the other finds it in Inductor's cache."""
    found = gang(2).run(compiled_here, str(tmp_path))
    assert sum(missed for missed, _, _ in found) == found[0][2]
    assert sum(hit for _, hit, _ in found) == found[0][2]


def compiled_here(folder: str) -> tuple[int, int, int]:
    """Graphs that Inductor compiled in this process, that it found, and distinct fusions."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    kernels._known.clear()
    from torch._dynamo.utils import counters

    before = dict(counters["inductor"])
    torch.manual_seed(0)
    x = torch.ones(4, 8)
    pipe = pipecompile.compile(
        models.Residual(2), 1, 2, microbatches=2, example_batch=x, backend="inductor"
    )
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    after = counters["inductor"]
    made = [after[key] - before.get(key, 0) for key in ("fxgraph_cache_miss", "fxgraph_cache_hit")]
    names = {name for program in programs(pipe).values() for name in fusions_of(program)}
    assert all(name.startswith(FUSION) for name in names)
    return made[0], made[1], len(names)


@pytest.mark.slow
def test_verify_allows_what_fused_kernels_round() -> None:
    pipe = jobs.pipeline("gpt2", 2, 1, 2, backend="inductor", verify=1)
    pipe.step(models.batches("gpt2", 4, 1)[0])
    assert 'backend="inductor" rounds' in pipe.verification


@pytest.mark.slow
@pytest.mark.parametrize("name", quickly([], ["gpt2"]))
def test_outputs_and_evaluation_are_those_of_eager_kernels(name: str) -> None:
    batch = models.batches(name, 4, 1)[0]
    made = []
    for backend in ("eager", "inductor"):
        pipe = jobs.pipeline(name, 2, 1, 2, backend=backend)
        made.append((pipe.evaluate(batch), pipe.forward(batch)["logits"]))
    torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-5)


ONE_STEP = """
import torch, pipecompile
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Tanh())
x = torch.ones(4, 8)
pipe = pipecompile.compile(
    model, 1, loss_fn=lambda out, _: out.square().mean(), example_batch=x, backend="inductor"
)
print(float(pipe.forward_backward(x)))
"""


@pytest.mark.slow
def test_what_a_killed_process_has_left_half_written_is_compiled_again(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def loss() -> str:
        command = [sys.executable, "-c", ONE_STEP]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole = loss()
    libraries = [
        library
        for library in tmp_path.rglob("*.main.so")
        if "chk_kernel" not in library.with_suffix(".cpp").read_text()  # what asks for AVX
    ]
    assert libraries
    for library in libraries:
        library.write_bytes(library.read_bytes()[:100])
    assert loss() == whole
    assert all(library.stat().st_size > 100 for library in libraries)


def test_only_what_inductor_keeps_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipecompile.runtime.kernels import inductor  # takes seconds

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    mine, other = inductor.folder() / "a" / "b.main.so", tmp_path / "b.so"
    for file, gone in ((mine, True), (other, False)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert inductor._removed(f"ImportError: {file}: file too short") is gone
        assert file.exists() is not gone
    assert not inductor._removed("CppCompileError: no such operator")
