"""The hash of a model: another one for all that may change its graph, the same for all else."""

from __future__ import annotations

import builtins
import functools
import logging
import os
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.kept.identity import UntoldError, identity_of
from pipecompile.compiler.kept.surroundings import settings
from torch import nn
from torch.nn import functional as F  # noqa: N812

CPU = torch.device("cpu")
SOURCE = """
import enum, functools, os, random, sys
import torch
from torch import nn
from torch.nn import functional as F

SCALE = 0.5
TABLE = {"first": 1, "second": 2}
WEIGHTS = torch.tensor([1.0, 2.0])
ORDER = ["norm", "linear"]

class Kind(enum.Enum):
    ONE = 1

class Helper:
    factor = 2.0
    def __init__(self, power=1):
        self.power = power
    def apply(self, x):
        return self.deeper(x) ** self.power
    def deeper(self, x):
        return x * self.factor
    def unused(self):
        return 1

def shift(x, by=1.0, *, twice=False):
    return inner(x) + by

def inner(x):
    return x * SCALE

def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

class Base(nn.Module):
    def before(self, x):
        return x + 1

class Model(Base):
    rate = 3
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.helper = Helper()
        self.kind = Kind.ONE
        self.settings = {"depth": 2}
        self.act = torch.tanh

    @property
    def sizes(self):
        return 2

    @decorated
    def forward(self, x):
        x = self.before(shift(x)) * TABLE["first"] * self.sizes * self.rate
        x = getattr(self, "branch")(self.helper.apply(self.linear(x)))
        return F.relu(self.act(x)) + WEIGHTS.sum() + Helper(2).apply(x)

    def branch(self, x):
        return x - 1
"""


@pytest.fixture
def home() -> Iterator[types.ModuleType]:
    yield module_of(SOURCE)
    del sys.modules["home"]


def module_of(source: str) -> types.ModuleType:
    made = types.ModuleType("home")
    sys.modules["home"] = made
    exec(compile(source, "home.py", "exec"), vars(made))
    return made


def hashed(home: types.ModuleType, *others: Any) -> str:
    return identity_of(skeleton_of(home.Model(), CPU).module, *others)


def test_it_is_the_same_for_the_same_model(home: types.ModuleType) -> None:
    """Weights are no part of it."""
    torch.manual_seed(0)
    first = hashed(home)
    torch.manual_seed(1)
    assert hashed(home) == first
    assert hashed(module_of(SOURCE)) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * SCALE", "x * SCALE * 1"),  # a function that a function calls
        ("SCALE = 0.5", "SCALE = 0.25"),
        ("SCALE = 0.5", "SCALE = -0.0"),
        ('"first": 1', '"first": 1.0'),
        ('{"first": 1, "second": 2}', '{"second": 2, "first": 1}'),  # forward may go through it
        ("[1.0, 2.0]", "[1.0, 2.5]"),
        ("by=1.0", "by=2.0"),
        ("twice=False", "twice=True"),
        ("factor = 2.0", "factor = 2.5"),
        ("x * self.factor", "x / self.factor"),  # a method of an object of the model
        ("power=1", "power=3"),
        ("self.power = power", "self.power = power + 1"),
        ("return x + 1", "return x + 2"),  # a method that is inherited
        ("rate = 3", "rate = 4"),
        ("return 2", "return 3"),  # a property
        ("return x - 1", "return x - 2"),  # named by a text
        ("return function(*args)", "return -function(*args)"),  # around forward
        ("torch.tanh", "torch.sigmoid"),
        ("F.relu(", "F.gelu("),
        ("ONE = 1", "ONE = 2"),
        ('"depth": 2', '"depth": 3'),
        ("nn.Linear(2, 2)", "nn.Linear(2, 2, bias=False)"),
        ("nn.Linear(2, 2)", "nn.Linear(2, 2).requires_grad_(False)"),
        ("nn.Linear(2, 2)", "nn.Linear(2, 2).double()"),
        ("Helper(2)", "Helper(3)"),
        ("class Model(Base)", "class Model(nn.Module, Base)"),
    ],
)
def test_what_a_graph_depends_on_counts(home: types.ModuleType, old: str, new: str) -> None:
    first = hashed(home)
    assert SOURCE.count(old)
    source = SOURCE.replace(old, new, 1)
    if "nn.Module, Base" in new:
        source = source.replace("class Base(nn.Module)", "class Base")
    assert hashed(module_of(source)) != first


def replaced(home: types.ModuleType) -> Iterator[tuple[str, Callable[[pytest.MonkeyPatch], None]]]:
    """What users put in the place of something while their program runs."""

    def other(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x

    yield "a function of the file", lambda patch: patch.setattr(home, "inner", other)
    yield "a method", lambda patch: patch.setattr(home.Model, "branch", lambda self, x: x)
    yield "a method of torch", lambda patch: patch.setattr(nn.Linear, "forward", lambda s, x: x)
    yield "a function of torch", lambda patch: patch.setattr(F, "relu", other)
    yield "a new global", lambda patch: patch.setattr(home, "F", types.SimpleNamespace(relu=other))
    yield "an attribute of a class", lambda patch: patch.setattr(home.Helper, "factor", 7.0)


@pytest.mark.parametrize("place", range(6))
def test_what_is_replaced_at_run_time_counts(
    home: types.ModuleType, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    first = hashed(home)
    _, replace = list(replaced(home))[place]
    replace(monkeypatch)
    assert hashed(home) != first
    monkeypatch.undo()
    assert hashed(home) == first


def test_what_is_set_on_an_instance_counts(home: types.ModuleType) -> None:
    model = home.Model()
    told = lambda: identity_of(model)  # noqa: E731
    seen = {told()}
    for change in (
        lambda: model.eval(),
        lambda: setattr(model, "forward", types.MethodType(lambda self, x: x, model)),
        lambda: model.register_forward_hook(lambda *_: None),
        lambda: model.linear.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
        lambda: setattr(model.linear, "bias", model.linear.weight),  # tied
        lambda: setattr(model, "extra", nn.ModuleDict({"a": nn.ReLU(), "b": nn.Tanh()})),
        lambda: setattr(model, "extra", nn.ModuleDict({"b": nn.Tanh(), "a": nn.ReLU()})),
        lambda: model.settings.update(depth=5),
        lambda: setattr(model.helper, "note", np.arange(3)),
        lambda: setattr(model.helper, "note", np.arange(1, 4)),
        lambda: setattr(model, "act", functools.partial(torch.add, other=1)),
        lambda: setattr(model, "act", functools.partial(torch.add, other=2)),
        lambda: torch.nn.utils.parametrizations.weight_norm(model.linear),
    ):
        change()
        found = told()
        assert found not in seen
        seen.add(found)


def test_closures_count() -> None:
    def loss_of(weight: float) -> Callable[[Any], Any]:
        def loss(x: Any) -> Any:
            return x * weight

        return loss

    assert identity_of(loss_of(0.5)) == identity_of(loss_of(0.5))
    assert identity_of(loss_of(0.5)) != identity_of(loss_of(0.25))


def reading(x: Any) -> Any:
    return x * float(os.environ.get("PIPECOMPILE_TEST_RATE", "1"))


def importing(x: Any) -> Any:
    from support import units

    return units.anything(x)


def test_compiled_code_is_told_by_its_version() -> None:
    """Cython's classes have a descriptor where others have the name of their module."""
    kind = type(np.random.mtrand.seed)
    assert not isinstance(type(kind).__module__, str)
    assert identity_of(kind, np.random.mtrand.seed) == identity_of(kind, np.random.mtrand.seed)
    assert identity_of(type(kind)) == identity_of(type(kind))


def test_the_environment_counts_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity_of(reading)
    monkeypatch.setenv("PIPECOMPILE_TEST_RATE", "2")
    assert identity_of(reading) != first
    other = identity_of(importing)
    monkeypatch.setenv("PIPECOMPILE_TEST_RATE", "3")
    assert identity_of(importing) == other


def test_what_is_imported_inside_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from support import units

    monkeypatch.setattr(units, "anything", lambda x: x, raising=False)
    first = identity_of(importing)
    monkeypatch.setattr(units, "anything", lambda x: -x, raising=False)
    assert identity_of(importing) != first


@pytest.mark.parametrize(
    "value",
    [torch.Generator(), {object(), object()}, np.array([object()]), iter(range(3)).__class__],
    ids=["generator", "set", "objects", "type"],
)
def test_what_cannot_be_told_is_said(value: Any) -> None:
    if isinstance(value, type):
        assert identity_of(value)
        return
    with pytest.raises(UntoldError):
        identity_of(value)


def test_what_has_no_meaning_for_a_graph_does_not_count() -> None:
    """Locks and loggers, and where in memory something is."""
    first = identity_of(types.SimpleNamespace(a=threading.Lock(), b=logging.getLogger("one")))
    assert first == identity_of(
        types.SimpleNamespace(a=threading.Lock(), b=logging.getLogger("one"))
    )


def test_other_settings_of_torch_count() -> None:
    before = settings(CPU)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert settings(CPU) != before
    with torch.autocast("cpu"):
        assert settings(CPU) != before
    torch.use_deterministic_algorithms(True)
    try:
        assert settings(CPU) != before
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.device("cpu"), pytest.raises(UntoldError, match="a mode of torch is active"):
        settings(CPU)
    assert settings(CPU) == before


@pytest.mark.slow
def test_it_is_the_same_in_every_process() -> None:
    """Text is hashed in another way in each, and so are sets of it ordered."""
    code = """
        import torch
        from pipecompile.compiler.capture.skeleton import skeleton_of
        from pipecompile.compiler.kept.identity import identity_of
        from support.models import gpt2
        print(identity_of(skeleton_of(gpt2(), torch.device("cpu")).module))
    """
    tests = Path(__file__).parents[2]
    path = os.pathsep.join([str(tests), *filter(None, sys.path)])
    found = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in (1, 2)
    }
    assert len(found) == 1


UNUSUAL = {
    "a list of a library's": ("sys.argv = ['x', 'OLD']", "x * float(sys.argv[1])"),
    "a name that is joined": ("os.environ['RA_' + 'TE'] = 'OLD'", "x * read('RA_TE')"),
    "a builtin of the user's": ("builtins.RATE = OLD", "x * RATE"),
    "an attribute of torch's": ("torch.rate = types.SimpleNamespace(r=OLD)", "x * torch.rate.r"),
    "of torch's class": ("nn.Linear.rate = OLD", "x * self.linear.rate"),
    "of tensors": ("torch.Tensor.relu = lambda x: x * OLD", "x.relu()"),
    "of the class of a class": ("Meta.__getitem__ = lambda cls, key: OLD", "x * Table['a']"),
    "the seed": ("torch.manual_seed(OLD)", "x * (torch.initial_seed() % 7)"),
    "what is dispatched": ("by_type.register(int)(lambda k, x: x * OLD)", "by_type(1, x)"),
    "a default that is made": ("Made.__init__.__defaults__ = (OLD,)", "x * Made().rate"),
}
AROUND = """
import builtins, functools, os, sys, types
import torch
from torch import nn

class Meta(type):
    pass

class Table(metaclass=Meta):
    pass

class Made:
    def __init__(self, rate=1):
        self.rate = rate

@functools.singledispatch
def by_type(k, x):
    return x

def read(name):
    return float(os.environ[name])

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return FORWARD
"""


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_ways_to_depend_on_something(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("RA_TE", "1")
    for place in (nn.Linear, torch, builtins):
        monkeypatch.setattr(place, "rate", None, raising=False)
    monkeypatch.setattr(builtins, "RATE", 1, raising=False)
    before, forward = UNUSUAL[kind]
    found = []
    relu = torch.Tensor.relu
    try:
        for value in ("2", "3", "2"):
            home = module_of(AROUND.replace("FORWARD", forward))
            exec(before.replace("OLD", value), vars(home))
            found.append(hashed(home))
    finally:
        torch.Tensor.relu = relu  # type: ignore[method-assign]
        sys.modules.pop("home", None)
    assert found[0] != found[1]
    assert found[0] == found[2] or "lambda" in before  # which stands in no file


@pytest.mark.parametrize(
    "forward",
    [
        "x * globals()['ra' + 'te']",
        "x * eval('ra' + 'te')",
        "x * sys.modules['ho' + 'me'].rate",
        "x * importlib.import_module('ho' + 'me').rate",
        "x * cached()",
    ],
)
def test_what_is_looked_up_at_run_time_is_not_told(forward: str) -> None:
    source = AROUND.replace("FORWARD", forward)
    home = module_of(f"import importlib{source}\ncached = functools.cache(lambda: 2)\ncached()")
    with pytest.raises(UntoldError):
        hashed(home)
    del sys.modules["home"]
