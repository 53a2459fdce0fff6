"""What functions do to the models that they build works on models without data, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.tensors.fakes import is_fake
from pipecompile.compiler.tensors.weightless import without_data
from safetensors.torch import load_file, save_file
from support.matrix import quickly
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

HALF = torch.bfloat16


class Net(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.layer, self.norm = (
            nn.Embedding(32, 16),
            nn.Linear(16, 16),
            nn.LayerNorm(16),
        )
        self.batch_norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 32, bias=False)
        self.register_buffer("mask", torch.ones(16, 16).tril())
        if tied:
            self.head.weight = self.embed.weight


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT


def dtype(wanted: torch.dtype) -> Callable[[nn.Module], bool]:
    """All floating-point tensors, and what is tied stays so."""
    return lambda net: (
        {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {wanted}
        and net.head.weight is net.embed.weight
    )


def tied(net: Any) -> bool:
    return net.head.weight is net.embed.weight and isinstance(net.head.weight, nn.Parameter)


def shaped(net: Any) -> bool:
    return bool(net.layer.weight.shape == (16, 16))


CONVERSIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool]]] = {
    "bfloat16": (lambda m: m.bfloat16(), dtype(HALF)),
    "half": (lambda m: m.half(), dtype(torch.float16)),
    "double": (lambda m: m.double(), dtype(torch.float64)),
    "float": (lambda m: m.half().float(), dtype(torch.float32)),
    "to-dtype": (lambda m: m.to(HALF), dtype(HALF)),
    "to-device": (lambda m: m.to("cpu"), tied),
    "to-both": (lambda m: m.to("cpu", HALF), dtype(HALF)),
    "to-like": (lambda m: m.to(torch.zeros(1, dtype=HALF)), dtype(HALF)),
    "type": (lambda m: m.type(HALF), dtype(HALF)),
    "cpu": (lambda m: m.cpu(), tied),
    "deepcopy": (lambda m: copy.deepcopy(m.bfloat16()), dtype(HALF)),
    "copied-then-cast": (lambda m: copy.deepcopy(m).to(HALF), dtype(HALF)),
    "swapped": (lambda m: _swapping(m), dtype(HALF)),
    "share-memory": (lambda m: m.share_memory(), tied),
    "frozen": (lambda m: m.requires_grad_(False), lambda m: not m.layer.weight.requires_grad),
    "data-cast": (lambda m: _set(m.layer.weight, HALF), lambda m: m.layer.weight.dtype is HALF),
    "data-listed": (
        lambda m: setattr(m.layer.bias, "data", torch.tensor([0.5] * 8)),
        lambda m: m.layer.bias.shape == (8,) and m.layer.bias.requires_grad,
    ),
    "skip-init": (
        lambda m: setattr(m, "layer", nn.utils.skip_init(nn.Linear, 16, 8)),
        lambda m: m.layer.weight.shape == (8, 16),
    ),
    "to-empty": (lambda m: m.to_empty(device="cpu"), tied),
    "load": (lambda m: m.load_state_dict(Net().state_dict()), tied),
    "load-narrow": (lambda m: m.bfloat16().load_state_dict(Net().state_dict()), dtype(HALF)),
    "assign": (
        lambda m: m.load_state_dict(Net().half().state_dict(), assign=True),
        lambda m: m.layer.weight.dtype is torch.float16,
    ),
    "weight-norm": (lambda m: parametrizations.weight_norm(m.layer), shaped),
    "weight-norm-cast": (
        lambda m: (parametrizations.weight_norm(m.layer), m.bfloat16()),
        lambda m: m.layer.weight.dtype is HALF,
    ),
    "old-weight-norm": (lambda m: nn.utils.weight_norm(m.layer), shaped),
    "spectral-norm": (lambda m: parametrizations.spectral_norm(m.layer), shaped),
    "orthogonal": (lambda m: parametrizations.orthogonal(m.layer), shaped),
    "parametrize": (
        lambda m: (
            parametrize.register_parametrization(m.layer, "weight", Symmetric()),
            m.bfloat16(),
            parametrize.remove_parametrizations(m.layer, "weight"),
        ),
        lambda m: m.layer.weight.dtype is HALF,
    ),
    "prune": (lambda m: prune.l1_unstructured(m.layer, "weight", 0.5), shaped),
    "average": (
        lambda m: torch.optim.swa_utils.AveragedModel(m).module,
        tied,
    ),
    "grad": (lambda m: _with_grad(m).bfloat16(), lambda m: m.layer.weight.grad.dtype is HALF),
    "draws": (
        lambda m: m.layer.weight.data.copy_(torch.distributions.Uniform(-1, 1).sample((16, 16))),
        tied,
    ),
}


def _swapping(net: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return net.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _set(param: torch.Tensor, wanted: torch.dtype) -> None:
    param.data = param.data.to(wanted)


def _with_grad(net: Any) -> Any:
    net.layer.weight.square().sum().backward()
    return net


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_model_is_changed_as_one_with_data(name: str) -> None:
    """The same shapes, dtypes and ties, under the same names."""
    change, holds = CONVERSIONS[name]

    def built() -> Any:
        net = Net()
        made = change(net)
        return made if isinstance(made, Net) else net

    with without_data():
        net = built()
    real = built()
    assert holds(net)
    assert holds(real)
    assert layout(net) == layout(real)
    large = [p for p in net.parameters() if p.numel() > 16]
    assert all(is_fake(p) and isinstance(p, nn.Parameter) for p in large)


def layout(net: nn.Module) -> dict[str, tuple[Any, ...]]:
    first: dict[int, str] = {}
    named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers())
    return {n: (t.shape, t.dtype, t.requires_grad, first.setdefault(id(t), n)) for n, t in named}


INITIALISERS = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
MORE = {"constant_": (2.0,), "sparse_": (0.1,)}


@pytest.mark.parametrize("name", INITIALISERS)
def test_initialisers(name: str) -> None:
    with without_data():
        shape = (4, 4, 3) if name == "dirac_" else (16, 16)
        tensor = nn.Parameter(torch.empty(*shape))
        getattr(nn.init, name)(tensor, *MORE.get(name, ()))
        assert (tensor.shape, tensor.requires_grad) == (shape, True)


def test_weights_of_files_can_be_loaded(tmp_path: Path) -> None:
    real = Net(tied=False)
    torch.save(real.state_dict(), tmp_path / "net.pt")
    save_file(real.state_dict(), tmp_path / "net.safetensors")
    with without_data():
        for state in (torch.load(tmp_path / "net.pt"), load_file(tmp_path / "net.safetensors")):
            net = Net(tied=False)
            assert not net.load_state_dict(state).missing_keys
            assert net.bfloat16().layer.weight.dtype is HALF


def test_short_lists_have_values() -> None:
    """Rates of layers, for example; and what is made of them, as long as it is short."""
    with without_data():
        rates = torch.linspace(0, 0.5, 6)
        assert [round(x.item(), 1) for x in rates] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
        assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6]
        assert is_fake(torch.arange(100_000))
        assert is_fake(torch.arange(64)[:, None] + torch.zeros(1, 64))
        assert nn.Parameter(torch.log(torch.arange(1, 17).float())).shape == (16,)


def test_batches_of_a_loader() -> None:
    with without_data():
        rows = torch.utils.data.TensorDataset(torch.zeros(32, 8, dtype=torch.long))
        loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
        assert [batch.shape for (batch,) in loader] == [(8, 8)] * 4


def test_torch_is_as_before() -> None:
    def now() -> list[Any]:
        validates = torch.distributions.Distribution._validate_args
        return [nn.Module._apply, torch.utils.data.DataLoader.__iter__, validates]

    before = now()
    with without_data():
        assert now()[0] is not before[0]
    assert now() == before


HUGE = """
import copy
import torch
import transformers
from torch import nn

def _config():
    return transformers.LlamaConfig(num_hidden_layers=2, hidden_size=8192, intermediate_size=16384,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=100_000)

def _batch():
    ids = torch.zeros(8, 64, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}

def cast():
    return transformers.LlamaForCausalLM(_config()).bfloat16(), _batch()

def tied_and_resized():
    model = transformers.LlamaForCausalLM(_config()).to("cpu", torch.bfloat16)
    model.resize_token_embeddings(100_032)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return copy.deepcopy(model), _batch()

def by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        return transformers.AutoModelForCausalLM.from_config(_config()), _batch()
    finally:
        torch.set_default_dtype(torch.float32)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", quickly(["cast"], ["cast", "tied_and_resized", "by_default"]))
def test_inspect_takes_them(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model of ten gigabytes, whose build with data would take its time."""
    (tmp_path / "huge.py").write_text(HUGE)
    command = f"inspect {tmp_path / 'huge.py'}:{name} --stages 2 --microbatches 2 --device h100"
    code = main([*command.split(), "--memory", "500GiB"])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert "LlamaForCausalLM: " in output.out
