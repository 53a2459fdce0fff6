"""What numbers and names of a checkpoint may be, whoever wrote it.

A checksum tells damage; this tells what no training can have left: a learning rate that is NaN, the
state of a scheduler that would put a text in the place of one of its methods.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ...compiler.ir.errors import CheckpointError
from ...compiler.memory.optimizer_cost import is_torchs
from ..files.index import Index

SEEDS = range(-(2**63), 2**64)  # that torch's generators take
_NATURAL = range(0, 2**63)
_EPOCHS = range(-1, 2**63)  # -1 before the first
_COUNTS = {"last_epoch": _EPOCHS, "_step_count": _NATURAL}
_ALWAYS = ("last_epoch", "base_lrs")  # which schedulers of every version of torch save


def damaged(what: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint is damaged: {what}")


def check_seed(value: Any) -> int:
    """Raises CheckpointError where a seed is none."""
    if type(value) is not int or value not in SEEDS:
        raise damaged(f"its seed is {value!r}")
    return value


def as_number(value: Any) -> float | None:
    """Of a number, or a tensor of one element; None of anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


# -- optimizers --------------------------------------------------------------------------------


def check_tables(name: str, facts: Any, index: Index) -> None:
    """An optimizer's tables agree with each other and with the tensors that there are.

    Args:
        name: what the names of its tensors begin with.

    Raises:
        CheckpointError: they do not.
    """
    groups, group_of = facts["groups"], facts["group_of"]
    tensors, values = facts["tensors"], facts["values"]
    named = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not named or not all(isinstance(each, dict) for each in (group_of, tensors, values)):
        raise damaged(f"what it says of {name!r} is no table")
    if not groups:
        raise damaged(f"{name!r} has no parameter groups")
    for fqn, number in group_of.items():
        if type(number) is not int or number not in range(len(groups)):
            raise damaged(f"{fqn!r} is in group {number!r} of {name!r}, which has {len(groups)}")
    unknown = [fqn for fqn in (*group_of, *tensors, *values) if fqn not in index.known]
    having = [fqn for table in (tensors, values) for fqn, states in table.items() if states]
    strays = [fqn for fqn in having if fqn not in group_of]
    if unknown or strays:
        raise damaged(f"{name!r} has a state of {(unknown + strays)[0]!r}, which it does not train")
    for fqn, keys in tensors.items():
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise damaged(f"{name!r} has no list of states of {fqn!r}")


def check_claimed(index: Index, tables: Mapping[str, Any]) -> None:
    """Every tensor belongs to the model, the loss or an optimizer, and all of these are there.

    Args:
        tables: what optimizers' tensors begin with -> what is said of the optimizer.

    Raises:
        CheckpointError: one is missing, or no table names it.
    """
    claimed = {
        f"{prefix}.{fqn}.{key}"
        for prefix, facts in tables.items()
        if facts is not None
        for fqn, keys in facts["tensors"].items()
        for key in keys
    }
    claimed |= set(index.trained.values())
    if missing := sorted(claimed - index.tensors.keys()):
        raise damaged(f"it has no tensor {missing[0]!r}")
    if surplus := sorted(index.tensors.keys() - claimed):
        raise damaged(f"nothing in it is said to have the tensor {surplus[0]!r}")


def check_settings(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """A parameter group's settings, as they were saved, are such as the optimizer has.

    Raises:
        CheckpointError: one is no finite number where a number belongs, or of another kind, or
            torch's own optimizer would not be made with it; or there is no learning rate.
    """
    if "lr" in group and "lr" not in saved:
        raise damaged("a parameter group has no lr")
    for key, value in saved.items():
        if key in ("params", "param_names"):
            raise damaged(f"a parameter group has its own {key!r}")
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in map(as_number, numbers):
            if number is not None and not math.isfinite(number):
                raise damaged(f"a parameter group has {key}={value!r}")
        rate = as_number(value)
        if "lr" in key.split("_") and (rate is None or rate < 0):
            raise damaged(f"a parameter group has {key}={value!r}, which is no learning rate")
        if key in group and not _alike(group[key], value):
            raise damaged(
                f"a parameter group has {key}={value!r}, and the optimizer {group[key]!r}"
            )
    _check_made_with(type(optimizer), saved)


def _check_made_with(kind: type[torch.optim.Optimizer], saved: Mapping[str, Any]) -> None:
    """torch's optimizers know the ranges of their settings, and say them where they are made. Their
    learning rates begin above 0, and a schedule may have them at 0 later."""
    if not is_torchs(kind):
        return
    known = set(inspect.signature(kind).parameters) - {"lr"}
    try:
        kind([torch.nn.Parameter(torch.empty(1, 1))], **{k: saved[k] for k in known & saved.keys()})
    except Exception as error:
        raise damaged(f"a parameter group is none of {kind.__name__}: {error}") from error


def check_steps(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    like: torch.Tensor,
    name: str,
    keys: frozenset[str],
) -> None:
    """One of torch's optimizers can step with settings and the states that were saved with them.

    It is tried: one step makes all states that belong to the settings, and a second one is made
    with those alone that were saved. ``amsgrad=True`` needs one that ``amsgrad=False`` does not
    leave.

    Args:
        like: a parameter that has the states.
        keys: their names.

    Raises:
        CheckpointError: it needs another one, and would fail in the next step.
    """
    kind = type(optimizer)
    if not keys or not is_torchs(kind):
        return
    settings = set(inspect.signature(kind).parameters) & saved.keys()
    param = torch.nn.Parameter(torch.ones((1,) * like.dim(), dtype=like.dtype))
    trial = kind([param], **{each: saved[each] for each in settings - {"lr"}})
    step = getattr(kind.step, "__wrapped__", kind.step)  # without the hooks of the user's
    try:
        param.grad = torch.zeros_like(param)
        step(trial)
    except Exception:  # as those that need a closure, or gradients that are sparse
        return
    states = trial.state[param]
    trial.state[param] = {key: value for key, value in states.items() if key in keys}
    try:
        step(trial)
    except KeyError as error:
        raise damaged(
            f"{kind.__name__} of its settings needs the state {error} of {name!r}, which has "
            f"{sorted(keys)}"
        ) from error
    except Exception:  # not for what is missing
        return


def _alike(here: Any, saved: Any) -> bool:
    """Whether one value may stand in the place of another."""
    if here is None or saved is None:
        return True
    if as_number(here) is not None:
        return as_number(saved) is not None
    if isinstance(here, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(here):
            return False
        return all(_alike(a, b) for a, b in zip(here, saved, strict=True))
    if isinstance(here, torch.Tensor):
        return isinstance(saved, torch.Tensor) and saved.shape == here.shape
    return isinstance(saved, type(here))


def check_state(
    optimizer: torch.optim.Optimizer,
    param: torch.Tensor,
    like: torch.Tensor,
    index: Index,
    name: str,
) -> None:
    """The form of an optimizer's state of a parameter is one that it can have.

    That is the form which this one's has, once it has stepped. torch's own have states of one
    element, of the parameter's shape, or of one that spreads to it, in floating point.

    Args:
        like: of the shape of the whole parameter.
        name: of the state in the checkpoint.

    Raises:
        CheckpointError: it is another one.
    """
    spec, key = index.tensors[name].spec, name.rpartition(".")[2]
    here = optimizer.state.get(param, {}).get(key) if param in optimizer.state else None
    known = is_torchs(type(optimizer)) and not isinstance(optimizer, torch.optim.LBFGS)
    shape = tuple(like.shape)
    if isinstance(here, torch.Tensor) and here.shape != param.shape:
        fits = spec.shape == tuple(here.shape)
    elif isinstance(here, torch.Tensor):
        fits = spec.shape == shape
    elif known:
        spread = zip(spec.shape, shape, strict=False)
        same = len(spec.shape) == len(shape) and all(a in (1, b) for a, b in spread)
        fits = not spec.shape or same
    else:
        fits = True
    if not fits:
        raise damaged(f"{name!r} is {list(spec.shape)}, of a parameter that is {list(shape)}")
    if known and like.is_floating_point() and category(spec.dtype) != "float":
        raise damaged(f"{name!r} is {spec.dtype}, of a parameter in floating point")


def check_step(name: str, tensor: torch.Tensor) -> None:
    """Raises CheckpointError where a counter of steps that was read is none."""
    if name.endswith(".step") and tensor.numel() == 1:
        number = as_number(tensor)
        if number is None or not math.isfinite(number) or not 0 <= number < 2**63 or number % 1:
            raise damaged(f"{name!r} is {number}, which is no number of steps")


def check_values(name: str, values: Any, keys: Sequence[str]) -> None:
    """States of a parameter that are no tensors.

    Args:
        keys: the states that are.

    Raises:
        CheckpointError: they are not such.
    """
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise damaged(f"the states of {name!r} are no table")
    for key, value in values.items():
        number = as_number(value)
        wrong = number is not None and not math.isfinite(number)
        if key in keys or wrong or (key == "step" and (number is None or not 0 <= number < 2**63)):
            raise damaged(f"{name!r} has the state {key}={value!r}")


def category(dtype: str) -> str:
    """What a dtype, by its name, counts: values are converted within one category alone."""
    for start in ("bfloat", "float", "complex", "bool"):
        if dtype.startswith(start):
            return start.removeprefix("b") if start == "bfloat" else start
    return "int"


# -- schedulers --------------------------------------------------------------------------------


def check_scheduler(scheduler: Any, state: Any) -> None:
    """An LR scheduler's state has the form of the one that it has.

    torch's take every entry as an attribute, whatever it is. Schedulers of the user's own that are
    not derived from torch's check theirs themselves.

    Raises:
        CheckpointError: an entry would take the place of a method or of what is no state, is of
            another kind or length, or is no number where there is one; or it has no epoch.
    """
    if not isinstance(scheduler, LRScheduler):
        return
    if not isinstance(state, dict):
        raise damaged(f"the LR scheduler's state is a {type(state).__name__}")
    here = scheduler.state_dict()
    if missing := [key for key in _ALWAYS if key in here and key not in state]:
        raise damaged(f"the LR scheduler's state has no {missing[0]!r}")
    for key, value in state.items():
        taken = hasattr(type(scheduler), str(key)) or key in vars(scheduler)
        if not isinstance(key, str) or (key not in here and taken):
            raise damaged(f"the LR scheduler's state has {key!r}, which is none of it")
        if key == "_schedulers":
            inner = getattr(scheduler, "_schedulers", ())
            if not isinstance(value, list) or len(value) != len(inner):
                raise damaged("the LR scheduler's state is of another number of schedulers")
            for each, theirs in zip(inner, value, strict=True):
                check_scheduler(each, theirs)
            continue
        _check_entry(key, value)
        if key in here and not _alike_state(here[key], value):
            raise damaged(f"the LR scheduler's state has {key}={value!r} and not {here[key]!r}")


def _check_entry(key: str, value: Any) -> None:
    """Numbers: counts are counts, rates are rates, and nothing is NaN."""
    if key in _COUNTS and (type(value) is not int or value not in _COUNTS[key]):
        raise damaged(f"the LR scheduler's state has {key}={value!r}")
    rates = any(word in ("lr", "lrs") for word in key.split("_"))
    for each in value if isinstance(value, (list, tuple)) else [value]:
        number = as_number(each)
        if number is not None and (math.isnan(number) or (rates and not 0 <= number < math.inf)):
            raise damaged(f"the LR scheduler's state has {key}={value!r}")


def _alike_state(here: Any, saved: Any) -> bool:
    if isinstance(here, bool) or isinstance(saved, bool):
        return here is None or saved is None or isinstance(here, bool) == isinstance(saved, bool)
    if as_number(here) is None and callable(here):
        return False
    if here is not None and saved is None:  # no number and no list of torch's becomes None
        return False
    if isinstance(here, (list, tuple)) and isinstance(saved, (list, tuple)):
        pairs = zip(here, saved, strict=False)
        same = len(here) == len(saved) or not here
        return same and all(_alike_state(a, b) for a, b in pairs)
    return _alike(here, saved)
