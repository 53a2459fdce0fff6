"""What compiles of the same small models have in common, worked out once per run of the tests.

Tracing takes two thirds of such a compile; the menus of units, and fake steps of the optimizer,
most of the rest. Passes rewrite graphs, so each compile gets a copy. Only models of libraries are
remembered, in the shape that they have when they are compiled, and what a test says to be traced as
well once as often (``traced_once``): all else that a test defines is traced.
Processes of one run find what the others have left in a folder that `conftest` names.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, replace
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any, TypeVar
from unittest import mock

import torch
from pipecompile.compiler.capture.capture import Captured
from pipecompile.compiler.driver import passes
from pipecompile.compiler.driver.capturing import Capturing, Wanted
from pipecompile.compiler.driver.record import PassRecord
from pipecompile.compiler.ir.graph import describe
from pipecompile.compiler.kept import optimizers
from pipecompile.compiler.kept.asking import UntoldError
from pipecompile.compiler.kept.folder import Entry, Folder, write
from pipecompile.compiler.memory.optimizer_cost import OptimizerMemory, optimizer_memory
from pipecompile.compiler.planning import parts
from pipecompile.compiler.tensors.fakes import is_fake
from pipecompile.compiler.units import cutter
from pipecompile.compiler.units import menus as menus_
from pipecompile.compiler.units.stash import Body, Stash
from torch import fx, nn

from support.folder import FOLDER, shared

T = TypeVar("T")
Menus = list[tuple[Stash, ...]]
_LIBRARIES = (
    "torch.nn.",
    "transformers.",
    "peft.",
    "support.models",
    "support.packed",
    "support.checkpoints",
)
_INNER = vars(nn.Module()).keys() - {"training"}
_times = count()
_FORWARD = {each.name for each in passes.FORWARD}
_NODES = ("recomputed", "exclusive", "shared", "forgets")  # of a stash


@contextmanager
def remembering() -> Iterator[None]:
    """Compile from memory where it is the same, of this process or of another one of the run; not
    in timings, which no run of the tests has started."""
    if FOLDER not in os.environ:
        yield
        return
    trace, options_of = Capturing.trace, parts.options_of
    with (
        mock.patch.object(Capturing, "trace", _capturing(trace)),
        mock.patch.object(parts, "options_of", _choosing(options_of)),
        mock.patch.object(optimizers, "optimizer_memory", _measuring(optimizer_memory)),
    ):
        yield


# -- graphs ---------------------------------------------------------------------------------------


def _capturing(trace: Callable[..., Captured]) -> Callable[..., Captured]:
    known: dict[Hashable, list[tuple[Captured, list[Any]]]] = {}  # an entry for each answer

    def captured(capturing: Capturing, wanted: Wanted, records: list[Any]) -> Captured:
        model = capturing.skeleton.module
        loss_fn = capturing.options.loss_fn
        kinds = [*map(type, model.modules()), *([] if loss_fn is None else [loss_fn])]
        if not all(map(_is_known, kinds)) or capturing.options.eager_modules:
            return trace(capturing, wanted, records)
        key = (wanted.mode, wanted.spec, wanted.weighs, wanted.chunks, shape_of(model))
        key = (*key, *_told(capturing))
        folder, name = Folder(shared()), _digest(key)
        shares = os.environ.get("PIPECOMPILE_CACHE") == "off"  # else no files are opened
        kept = known.setdefault(key, [])
        one = next((each for each in kept if _is_for(each[0], capturing, wanted)), None)
        with _alone(name, one is not None or not shares):
            looks = shares and one is None
            if looks and (entry := folder.find(name, wanted.batch, capturing.skeleton.mode)):
                kept.append((entry.captured, [PassRecord(*each) for each in entry.records]))
                one = kept[-1] if _is_for(entry.captured, capturing, wanted) else None
            if one is None:
                made = trace(capturing, wanted, records)
                if capturing.skeleton.regions.patterns:  # calls of this model, and of no other
                    return made
                kept.append((_copied(made), list(records)))
                if shares:
                    with suppress(UntoldError):
                        folder.add(name, Entry(made, tuple(map(astuple, records)), ()))
                return made
        records[:] = one[1]
        capturing.skeleton.met(one[0].graph, one[0].lost, one[0].guards)
        return _copied(one[0])

    return captured


def _is_for(captured: Captured, capturing: Capturing, wanted: Wanted) -> bool:
    """Whether forward, which has asked the batch or buffers, would be told the same now."""
    guards, held = captured.guards, capturing.skeleton.values_of_buffers()
    for name in guards.buffers:
        if name not in held or not torch.equal(guards.constants[name].to(held[name]), held[name]):
            return False
    return not guards or (bool(wanted.batch) and guards.difference(wanted.batch) is None)


def _is_known(kind: Any) -> bool:
    """Of a class of modules, or a loss; one that is a module is traced with the model."""
    if isinstance(kind, nn.Module):
        return True
    return kind.__module__.startswith(_LIBRARIES) or getattr(kind, "traced_once", False)


def _told(capturing: Capturing) -> Iterator[Hashable]:
    """What a capture depends on besides the model and the batch."""
    dtypes = capturing.options.dtypes
    later: Any = {"grads": torch.float32, "boundary": None, "loss_scale": None}
    yield repr(dtypes and replace(dtypes, **later))
    yield _said(capturing.options.loss_fn)
    yield tuple(name for name in capturing.options.skip if name in _FORWARD)
    yield capturing.device
    yield capturing.kind


@contextmanager
def _alone(name: str, known: bool = False) -> Iterator[None]:
    """What is worked out inside, other processes wait for, and then find it; not if it is known."""
    if known:
        yield
        return
    with (shared() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(key: Hashable) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()


def _copied(captured: Captured) -> Captured:
    return replace(captured, graph=captured.graph.copy()[0])


def shape_of(model: nn.Module) -> str:
    """All of a model that its graph depends on: modules and their settings, modes, hooks, tensors
    and which of them are tied."""
    lines = []
    for name, part in model.named_modules(remove_duplicate=False):
        own = vars(part)
        plain = {k: said for k, v in own.items() if k not in _INNER and (said := _said(v))}
        held = {k: _layout(v) for k, v in own.items() if isinstance(v, torch.Tensor)}
        hooks = [k for k, v in own.items() if k.endswith("hooks") and v]
        lines.append(f"{name} {type(part)} {plain} {held} {hooks}")
    first: dict[int, str] = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            lines.append(f"{name} {_layout(tensor)} {first.setdefault(id(tensor), name)}")
    config: Any = getattr(model, "config", None)
    return "\n".join([*lines, str(vars(config) if config is not None else "")])


def _said(value: Any) -> str:
    """A setting, told by what it is; "" for what is told elsewhere, or does not concern a graph."""
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, FunctionType):
        line = value.__code__.co_firstlineno
        once = f"{os.getpid()} {next(_times)}" if value.__closure__ else ""  # never the same
        return f"{value.__module__}.{value.__qualname__}:{line}{once}"
    if isinstance(value, dict):
        return repr({k: said for k, v in value.items() if (said := _said(v))})
    if isinstance(value, (list, tuple, set)):
        return repr([said for v in value if (said := _said(v))])
    return ""


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    like = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return (*like, tensor.requires_grad, is_fake(tensor))


# -- menus -----------------------------------------------------------------------------------------


def _choosing(options_of: Callable[..., Menus]) -> Callable[..., Menus]:
    known: dict[Hashable, list[list[dict[str, Any]]]] = {}

    def chosen(bodies: Sequence[Body], *told: Any) -> Menus:
        graph = bodies[0].forward[0].graph
        units = [[[node.name for node in part] for part in (b.forward, b.backward)] for b in bodies]
        limits = (cutter.MAX_OPTIONS, menus_.MAX_FORGETFUL)
        key = (_text(graph), repr(units), repr(told[1:]), limits)
        name = _digest(key)
        path = shared() / f"{name}.menus"
        with _alone(name, key in known):
            if key not in known and path.exists():
                known[key] = pickle.loads(path.read_bytes())
            if key not in known:
                made = options_of(bodies, *told)
                known[key] = [[_named(each) for each in menu] for menu in made]
                write(path, pickle.dumps(known[key]))
                return made
        nodes = {node.name: node for node in graph.nodes}
        return [tuple(_again(each, nodes) for each in menu) for menu in known[key]]

    return chosen


def _text(graph: fx.Graph) -> str:
    """Nodes with what they read and make."""
    return "\n".join(f"{n} {n.target} {n.args} {n.kwargs} {describe(n)}" for n in graph.nodes)


def _named(choice: Stash) -> dict[str, Any]:
    """With names for nodes, which are another graph's next time."""
    return vars(choice) | {
        field: frozenset(node.name for node in getattr(choice, field)) for field in _NODES
    }


def _again(fields: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> Stash:
    found = {field: frozenset(nodes[name] for name in fields[field]) for field in _NODES}
    return Stash(**{**fields, **found})


# -- optimizers ------------------------------------------------------------------------------------


def _measuring(measure: Callable[..., OptimizerMemory]) -> Callable[..., OptimizerMemory]:
    """Of torch's own optimizers: of others their makers may look at more than at layouts."""
    known: dict[Hashable, OptimizerMemory] = {}

    def measured(factory: Any, params: Mapping[str, torch.Tensor]) -> OptimizerMemory:
        made = factory if isinstance(factory, partial) else partial(factory)
        if made.args or not getattr(made.func, "__module__", "").startswith("torch.optim"):
            return measure(factory, params)
        key = made.func, repr(made.keywords), repr([(n, _layout(p)) for n, p in params.items()])
        if key not in known:
            known[key] = measure(factory, params)
        return replace(known[key], state_bytes=dict(known[key].state_bytes))

    return measured
