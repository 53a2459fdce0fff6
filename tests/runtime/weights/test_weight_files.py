"""Weights from safetensors files: each rank reads its own, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.runtime.files import tensor_file
from pipecompile.runtime.interchange.huggingface import import_
from pipecompile.runtime.weights.materialize import materialize, source_of
from pipecompile.runtime.weights.weight_files import WeightFiles
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import models
from support.gang import Gang
from support.weightless import CPU, State, Tiny, assert_same, compiled, empty, saved
from torch import nn


def test_shards_that_hugging_face_wrote(tmp_path: Path) -> None:
    """Without lm_head.weight, which is tied; the model's own weights and seed do not matter."""
    expected = models.build("gpt2").state_dict()
    folder = saved(models.build("gpt2"), tmp_path)
    model = models.build("gpt2", seed=5)
    model.transformer.h[0].requires_grad_(False)
    pipe = compiled(model, 2, weights=folder)
    assert_same(pipe.state_dict(), expected)
    assert not any("h.0." in name for name, p in pipe.named_parameters() if p.requires_grad)
    pipe.step(models.batches("gpt2", 4, 1)[0])
    frozen = pipe.state_dict()["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(frozen, expected["transformer.h.0.mlp.c_fc.weight"])


def from_files(name: str, n_stages: int, folder: Path) -> tuple[State, int]:
    pipe = compiled(empty(name), n_stages, batch=name, weights=folder)
    return pipe.state_dict(), sum(p.nbytes for p in pipe.parameters())


def test_each_process_reads_its_own(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    real = models.build("llama")
    total = sum(p.nbytes for p in real.parameters())
    answers = gang(2).run(from_files, "llama", 2, saved(real, tmp_path))
    for state, held in answers:
        assert_same(state, real.state_dict())
        assert held < 0.65 * total
    assert sum(held for _, held in answers) == total


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Watched:
        def __init__(self, file: Path):
            self.file = safe_open(file, framework="pt")

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def metadata(self) -> Any:
            return self.file.metadata()

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    save_file(Tiny().state_dict(), tmp_path / "model.safetensors")
    skeleton = skeleton_of(Tiny(), CPU)
    files = WeightFiles(tmp_path, skeleton)
    monkeypatch.setattr("pipecompile.runtime.weights.weight_files._open", Watched)
    materialize(files, skeleton, {CPU: ["second.weight", "first.bias"]})
    assert read == ["second.weight", "first.bias"]


def test_another_dtype_is_cast(tmp_path: Path) -> None:
    real = models.build("llama").to(torch.bfloat16)
    save_file(real.state_dict(), tmp_path / "any.safetensors")
    for path in (tmp_path, tmp_path / "any.safetensors"):
        found = read(empty("llama"), path)
        assert_same(found, {name: t.float() for name, t in real.state_dict().items()})


def read(model: nn.Module, path: Path) -> State:
    skeleton = skeleton_of(model, CPU)
    files = WeightFiles(path, skeleton)
    names = [name for name in dict.fromkeys(skeleton.canonical.values()) if files.has(name)]
    return {n: p.held[CPU] for n, p in materialize(files, skeleton, {CPU: names}).items()}


def write_with_sums(file: Path, state: State) -> None:
    specs = {
        n: tensor_file.TensorSpec(tensor_file.dtype_name(t.dtype), tuple(t.shape))
        for n, t in state.items()
    }
    tensor_file.write(file, specs, state.__getitem__, tells_sums=True)


def test_any_flipped_bit_of_an_export_is_told_or_does_no_harm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: tensor.detach() for name, tensor in Tiny().state_dict().items()}
    whole = tmp_path / "whole.safetensors"
    write_with_sums(whole, state)
    assert_same({name: load_file(whole)[name] for name in state}, state)  # as others read it
    content, told = whole.read_bytes(), 0
    bits = random.Random(0).sample(range(8 * len(content)), 300)
    data_begins = 8 + int.from_bytes(content[:8], "little")
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (damaged := tmp_path / "damaged.safetensors").write_bytes(flipped)
        try:
            found = read(Tiny(), damaged)
        except errors.StateError as error:
            told += "is not what was written" in str(error)
            continue
        assert_same(found, state)
    assert told >= sum(bit // 8 >= data_begins for bit in bits) > 100


def test_a_checkpoint_is_made_of_no_damaged_export(tmp_path: Path) -> None:
    write_with_sums(tmp_path / "model.safetensors", Tiny().state_dict())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 4]))
    with pytest.raises(errors.CheckpointError, match="is not what was written"):
        import_(tmp_path, tmp_path / "run")
    assert not list(tmp_path.glob("run/step-*"))


def test_more_than_the_model_has_is_left_out_aloud(tmp_path: Path) -> None:
    model = Tiny()
    save_file(model.state_dict() | {"head": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="has 1 tensors that the model does not.*'head'"):
        source_of(model, skeleton_of(model, CPU), tmp_path, 0, warn=True)


def change(file: Path, edit: Callable[[State], Any]) -> None:
    state = load_file(file)
    edit(state)
    save_file(state, file)


def edit_index(folder: Path, **shards: Any) -> None:
    index = {"weight_map": {"first.weight": "a.safetensors", "second.weight": "a.safetensors"}}
    index["weight_map"] |= {"first.bias": "a.safetensors", "second.bias": "a.safetensors"}
    index["weight_map"] |= {name.replace("_", "."): shard for name, shard in shards.items()}
    index["weight_map"] = {n: shard for n, shard in index["weight_map"].items() if shard}
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def one(edit: Callable[[State], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "model.safetensors", edit)


def renamed(rename: Callable[[str], str]) -> Callable[[State], None]:
    def edit(state: State) -> None:
        for name in list(state):
            state[rename(name)] = state.pop(name)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one(lambda s: s.pop("first.bias")), r"model.safetensors lacks 'first.bias' of the model"),
        (one(lambda s: s.update({"first.bias": torch.ones(9)})), r"'first.bias' has shape \[9\]"),
        (one(lambda s: s.update({"first.bias": torch.ones(8).byte()})), "is U8, which has no mean"),
        (one(renamed(lambda n: f"model.{n}")), "have a prefix 'model.' that the model's lack"),
        (
            one(renamed(lambda n: n.split(".")[1] + n[:2])),
            "must be those of the model's state_dict",
        ),
        (truncate, r"model.safetensors cannot be read, the file is damaged or incomplete"),
        (
            lambda f: edit_index(f, first_bias="b.safetensors"),
            r"b.safetensors: the file is missing",
        ),
        (lambda f: edit_index(f, first_bias=None), r"index.json lacks 'first.bias' of the model"),
        (
            lambda f: edit_index(f, third_bias="a.safetensors"),
            "'third.bias' is in a.safetensors, w",
        ),
        (lambda f: edit_index(f, first_bias="../a.safetensors"), "names '../a.safetensors', which"),
        (lambda f: edit_index(f, first_bias="/a.safetensors"), "not a file below its own folder"),
        (lambda f: edit_index(f, first_bias=3), "names 3, which is not a file"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    save_file(Tiny().state_dict(), tmp_path / "model.safetensors")
    damage(tmp_path)
    with pytest.raises(errors.StateError, match=message):
        read(Tiny(), tmp_path)


def test_a_base_models_file(tmp_path: Path) -> None:
    models.build("gpt2").transformer.save_pretrained(tmp_path)
    with pytest.raises(errors.StateError, match="without the model's prefix 'transformer\\.'"):
        read(models.build("gpt2"), tmp_path)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", '{"weight_map": []}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(errors.StateError, match="is no index of safetensors files"):
            read(Tiny(), tmp_path)


def test_tied_names_with_two_values(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in models.build("gpt2").state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert_same(read(empty("gpt2"), tmp_path), drop_head(state))
    del state["transformer.wte.weight"]  # either name will do
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(
        read(empty("gpt2"), tmp_path)["transformer.wte.weight"], state["lm_head.weight"]
    )
    state["transformer.wte.weight"] = state["lm_head.weight"] + 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(errors.StateError, match=r"have two values, and are one tied tensor"):
        read(empty("gpt2"), tmp_path)


def drop_head(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ([], "nowhere", "nowhere' does not exist"),
        ([], "", "has no .safetensors file"),
        (
            ["a.safetensors", "b.safetensors"],
            "",
            "has a.safetensors, b.safetensors and no model.sa",
        ),
        (["model.bin"], "model.bin", "is no .safetensors file"),
    ],
)
def test_paths(tmp_path: Path, files: list[str], given: str, message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(errors.OptionError, match=message):
        pipecompile.compile(Tiny(), 1, weights=tmp_path / given)


def refused(folder: Path, dp: int, zero: int) -> str:
    """Each rank's own file; what compiling raises."""
    torch.manual_seed(0)
    model, path = models.gpt2(), folder / os.environ["RANK"]
    try:
        compiled(model, 2 // dp, dp, weights=path, zero=zero)
    except errors.PipecompileError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("dp", "zero", "damage", "message"),
    [
        (1, 0, truncate, "StateError: .*1/model.safetensors cannot be read"),
        pytest.param(
            2,
            0,
            one(lambda s: s["transformer.wpe.weight"].add_(1)),
            "'transformer.wpe.weight' diff",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            3,
            one(lambda s: s["transformer.wpe.weight"].add_(1)),
            "'transformer.wpe.weight' diff",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_ranks_error_is_everyones(
    gang: Callable[[int], Gang],
    tmp_path: Path,
    dp: int,
    zero: int,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    for rank in "01":
        models.build("gpt2").save_pretrained(tmp_path / rank)
    damage(tmp_path / "1")
    first, second = gang(2).run(refused, tmp_path, dp, zero)
    assert first == second
    assert re.search(message, first)
