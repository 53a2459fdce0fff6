"""Where a user's function builds a model without data: what it may do to one with data works.

Tensors are fake ones (`fakes`). Some of what libraries do to a model needs the object
behind a tensor, which fake ones lack, or looks at values to check them; it is done otherwise in
here. Short lists of numbers (rates of layers by `torch.linspace`) have values; what the function
itself makes depend on others stays an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributions import constraints
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from .fakes import FakeTensor, weightless, with_data
from .pytree import tensors_in


@contextmanager
def without_data() -> Iterator[None]:
    """Models and batches that are built inside have no data."""
    rows = DataLoader.__iter__
    patches: list[tuple[Any, str, Any]] = [
        (nn.Module, "_apply", _apply),
        (DataLoader, "__iter__", lambda loader: _with_values(rows, loader)),
        # checks of what was drawn, or is about to be
        (parametrizations, "_is_orthogonal", lambda *_: True),
        (type(constraints.positive_definite), "check", _holds),
        (torch.distributions.Distribution, "_validate_args", False),
    ]
    with ExitStack() as stack:
        stack.enter_context(weightless())
        stack.enter_context(_NoData())
        for owner, name, made in patches:
            stack.enter_context(mock.patch.object(owner, name, made))
        yield


def _apply(module: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which is behind ``.bfloat16()``, ``.to(...)`` and the like.

    torch swaps the insides of fake parameters, which fails where something has a weak reference to
    one, as torch itself often does. Here they get other data, as parameters with data do: the
    object stays, and with it what is tied.
    """
    for child in module.children() if recurse else ():
        child._apply(fn)  # type: ignore[no-untyped-call]
    for name, param in module._parameters.items():
        if param is None:
            continue
        with torch.no_grad():
            made = fn(param)
            grad = None if param.grad is None else fn(param.grad)
        param.grad = None
        if torch._has_compatible_shallow_copy_type(param, made):
            param.data = made
        else:
            module._parameters[name] = param = nn.Parameter(made, param.requires_grad)
        param.grad = grad
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _with_values(rows: Callable[[Any], Iterator[Any]], loader: Any) -> Iterator[Any]:
    """A loader's batches: it draws which rows they have, and reads that."""
    with with_data():
        found = rows(loader)
    while True:
        with with_data():
            batch = next(found, None)
        if batch is None:
            return
        yield batch


def _holds(_: object, value: torch.Tensor) -> torch.Tensor:
    return torch.tensor(True).expand(value.shape[:-2])


_LISTS = (torch.tensor, torch.arange, torch.linspace, torch.logspace)
_SHORT = 4096  # elements
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class _NoData(TorchFunctionMode):
    """What code finds that looks at a tensor itself.

    Whether it is on the meta device, where there is no data: yes. `nn.init.trunc_normal_` asks, and
    would otherwise look at what it drew. A copy of it is one of its shape, and it is in every
    process: there is no storage. That of a file is one with data.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return True
        if func is torch.Tensor.__deepcopy__:
            return _copied(*args)
        if func == _SET_DATA and isinstance(args[0], FakeTensor):
            args = args[0], args[0].fake_mode.from_tensor(args[1])
        if func is torch.Tensor.share_memory_ and isinstance(args[0], FakeTensor):
            return args[0]
        if _has_values(func, args, kwargs):
            with with_data():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _has_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Of a list of numbers, of what is made of such lists alone, and of a file's bytes."""
    if func is torch.asarray:
        return isinstance(args[0], torch.UntypedStorage)
    given = list(tensors_in((args, kwargs)))
    if func in _LISTS:
        if given or str(kwargs.get("device") or "cpu") != "cpu":
            return False
        made = func(*args, **kwargs)
        return bool(made.numel() <= _SHORT)
    return bool(given) and all(type(x) is torch.Tensor and x.numel() <= _SHORT for x in given)


def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """As `copy.deepcopy` wants it."""
    if not isinstance(tensor, FakeTensor):
        with with_data():
            return tensor.__deepcopy__(memo)  # type: ignore[no-untyped-call,no-any-return]
    if id(tensor) not in memo:
        with torch.no_grad():
            made = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, tensor.requires_grad)
        memo[id(tensor)] = made.requires_grad_(tensor.requires_grad)
    copied: torch.Tensor = memo[id(tensor)]
    return copied
