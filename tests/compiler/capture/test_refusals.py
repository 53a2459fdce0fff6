"""Models and batches that cannot be compiled: each is named, with what to give instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
import torch.distributed as dist
from pipecompile import errors
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module

X = torch.randn(4, 8)
IDS = torch.randint(10, (4, 3))


class Tiny(nn.Module):
    """Returns a scalar; its first layer is given."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8) if first is None else first
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x)).square().mean()


class Functional(Tiny):
    """An embedding that is no module."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(nn.functional.embedding(x, self.second.weight, sparse=True))


class Own(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs)


def compile_(model: Any, batch: Any = X, **options: Any) -> Any:
    return pipecompile.compile(model, 1, example_batch=batch, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Tiny().state_dict(), "model is a OrderedDict: .* load the state dict into it"),
        ("model.pt", "model='model.pt' is a path or a name: build the model"),
        (Path("model.pt"), "model='model.pt' is a path or a name"),
        (Tiny, "model is the class Tiny: give an instance"),
        (None, "model is a NoneType: give a torch.nn.Module"),
    ],
)
def test_what_is_no_module(given: Any, message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        compile_(given)


def in_place() -> nn.Module:
    model = Tiny()
    model.compile()
    return model


def with_buffer(buffer: torch.Tensor) -> nn.Module:
    model = Tiny()
    model.register_buffer("table", buffer)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(Tiny()), "the model is made by torch.jit: give the Python"),
        (lambda: torch.jit.trace(Tiny(), X), "the model is made by torch.jit"),
        (lambda: Tiny(torch.jit.script(nn.Linear(8, 8))), "module 'first' is made by torch.jit"),
        (lambda: torch.export.export(Tiny(), (X,)).module(), "the model is made by torch.export"),
        (lambda: torch.compile(Tiny()), r"compiled by torch.compile.* give .*\._orig_mod"),
        (lambda: Tiny(torch.compile(nn.Linear(8, 8))), "module 'first' is compiled by torch.comp"),
        (in_place, r"compiled by its compile\(\), which has no part here: leave that call out"),
        (lambda: nn.DataParallel(Tiny()), r"the model is wrapped in DataParallel: give .*\.module"),
        (lambda: Tiny(nn.LazyLinear(8)), "'first.weight' is not initialised yet: run the model"),
        (lambda: Tiny(nn.LazyBatchNorm1d()), "'first.weight' is not initialised yet"),
        (lambda: Tiny(nn.Embedding(10, 8, sparse=True)), "module 'first' is an embedding with sp"),
        (lambda: Tiny(nn.EmbeddingBag(10, 8, sparse=True)), "module 'first' is an embedding with"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(Tiny(), {nn.Linear}),
            "module 'first' is quantised",
        ),
        (
            lambda: with_buffer(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)),
            "buffer 'table' is quantised",
        ),
        (lambda: with_buffer(X.to_sparse()), "buffer 'table' is of layout torch.sparse_coo"),
        (lambda: with_buffer(X.as_subclass(Own)), "buffer 'table' is a Own, which computes in its"),
    ],
)
def test_models_of_other_kinds(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(errors.CaptureError, match=message):
        compile_(make())


@pytest.fixture
def _joined() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_joined")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.parallel.DistributedDataParallel, r"wrapped in Dist.*\.module; dp= makes replicas"),
        (
            partial(FullyShardedDataParallel, device_id=torch.device("cpu")),
            "wrapped in FullySharded.* zero=3 divides parameters",
        ),
        (fully_shard, "divided by fully_shard: give the model as it was before"),
        (distribute_module, "parameter 'first.weight' is a DTensor"),
    ],
)
def test_models_that_another_library_divides(wrap: Callable[..., Any], message: str) -> None:
    mesh = dist.init_device_mesh("cpu", (1,))
    given = {"mesh": mesh} if wrap is fully_shard else {}
    model = wrap(Tiny(), mesh) if wrap is distribute_module else wrap(Tiny(), **given)
    with pytest.raises(errors.CaptureError, match=message):
        compile_(model)


def test_sparse_gradients_of_what_is_no_module() -> None:
    with pytest.raises(errors.CaptureError, match=r"makes a sparse tensor.* give sparse=False"):
        compile_(Functional(), torch.randint(8, (4, 3)))


def test_a_frozen_sparse_embedding_has_no_gradient() -> None:
    model = Tiny(nn.Embedding(10, 8, sparse=True).requires_grad_(False))
    assert compile_(model, IDS).evaluate(IDS) == model(IDS)


# -- batches ------------------------------------------------------------------------------------


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return nn.functional.cross_entropy(self.convolution(x).mean((2, 3)), y)


IMAGE, CLASSES = torch.randn(4, 3, 8, 8), torch.randint(8, (4,))


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_a_leaf_of_another_dtype(dtype: torch.dtype, precision: str | None) -> None:
    said = f"batch's 'x' is {str(dtype)[6:]}, and module 'first' computes with float32: give it"
    with pytest.raises(errors.BatchError, match=said):
        compile_(Tiny(), {"x": X.to(dtype)}, precision=precision)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Tiny(nn.LayerNorm(8)), X.double(), "module 'first' computes with float32"),
        (Image(), {"x": IMAGE.byte(), "y": CLASSES}, r"\(x: uint8.*float32: module 'convolution'"),
        (Image(), {"x": IMAGE, "y": CLASSES.int()}, "'y' is int32, .* computes with int64"),
        (Image(), {"x": IMAGE, "y": CLASSES.float()}, "does not take the batch.* refuses a dtype"),
        (Tiny(nn.Embedding(10, 8)), IDS.float(), "module 'first' (refuses a dtype|.* with int64)"),
        (Tiny(), X.to_sparse(), "'batch' is sparse or nested: give it dense"),
        (Tiny(), torch.nested.nested_tensor([X, X]), "'batch' is sparse or nested"),
        (Tiny(), X[:0], "the batch has 0 rows"),
    ],
)
def test_leaves_that_an_operator_refuses(model: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises(errors.BatchError, match=message):
        compile_(model, batch)


def test_a_model_that_mixes_dtypes() -> None:
    model = Tiny(nn.Linear(8, 8).double())
    with pytest.raises(
        errors.BatchError, match=r"'batch' is float32, and module 'first' .* float6"
    ):
        compile_(model)
    with pytest.raises(
        errors.CaptureError, match=r"module 'second' gives .* float64 where it takes"
    ):
        compile_(model, X.double())
