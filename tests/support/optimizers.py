"""Small optimizers of the kinds that people use and torch lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer


class Stepper(Optimizer):
    """One `update` per parameter that has a gradient."""

    def __init__(self, params: Any, lr: float = 0.02, **settings: Any):
        super().__init__(params, {"lr": lr, **settings})

    def trained(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield group, param, self.state[param]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, param, state in self.trained():
            self.update(group, param, state)

    def update(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Factored(Stepper):
    """Adafactor's second moment: of rows and columns, for matrices that are large enough."""

    def __init__(self, params: Any, lr: float = 0.02, least: int = 16):
        super().__init__(params, lr, least=least)

    def update(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any]) -> None:
        square = param.grad.square() + 1e-30
        if param.dim() == 2 and min(param.shape) >= group["least"]:
            rows = _averaged(state, "rows", square.mean(1))
            columns = _averaged(state, "columns", square.mean(0))
            second = torch.outer(rows, columns) / rows.mean()
        else:
            second = _averaged(state, "second", square)
        param.sub_(param.grad / second.sqrt(), alpha=group["lr"])


class Muon(Stepper):
    """Orthogonalised momentum for matrices, signs of it for the rest."""

    def update(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any]) -> None:
        momentum = _averaged(state, "momentum", param.grad)
        step = _orthogonal(momentum) if param.dim() == 2 else momentum.sign()
        param.sub_(step, alpha=group["lr"])


class Wide(Stepper):
    """Muon for matrices from 200×200 on: no stand-in is as large, and no state tells."""

    def update(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any]) -> None:
        momentum = _averaged(state, "momentum", param.grad)
        wide = param.dim() == 2 and min(param.shape) >= 200
        param.sub_(_orthogonal(momentum) if wide else momentum.sign(), alpha=group["lr"])


class Shampoo(Stepper):
    """A preconditioner for each side of a matrix, made anew every ``every`` steps."""

    def __init__(self, params: Any, lr: float = 0.02, every: int = 3):
        super().__init__(params, lr, every=every)

    def update(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any]) -> None:
        grad = param.grad
        if param.dim() != 2:
            param.sub_(
                grad / (_averaged(state, "second", grad.square()).sqrt() + 1e-8), alpha=group["lr"]
            )
            return
        if not state:
            for key, size in zip("lr", param.shape, strict=True):
                state[key] = torch.eye(size, dtype=param.dtype) * 1e-3
                state[f"{key}_root"] = torch.eye(size, dtype=param.dtype)
            state["steps"] = 0
        state["l"] += grad @ grad.T
        state["r"] += grad.T @ grad
        state["steps"] += 1
        if state["steps"] % group["every"] == 0:
            for key in "lr":
                state[f"{key}_root"] = _root(state[key])
        param.sub_(state["l_root"] @ grad @ state["r_root"], alpha=group["lr"])


class Prodigy(Stepper):
    """Adam with one step size for all parameters, which is estimated as it goes (Mishchenko and
    Defazio, "Prodigy", 2024)."""

    def __init__(self, params: Any, lr: float = 1.0):
        super().__init__(params, lr, d=1e-4, top=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        below = 0.0
        for group, param, state in self.trained():
            if not state:
                state |= {key: torch.zeros_like(param) for key in ("first", "second", "sum")}
                state["start"] = param.clone()
            d, grad = group["d"], param.grad
            group["top"] += float(
                d * d * torch.dot(grad.flatten(), (state["start"] - param).flatten())
            )
            state["sum"].add_(grad, alpha=d * d)
            state["first"].lerp_(grad * d, 0.1)
            state["second"].lerp_(grad.square() * d * d, 0.01)
            below += float(state["sum"].abs().sum())
        for group in self.param_groups:
            if below:
                group["d"] = max(group["d"], group["top"] / below)
        for group, param, state in self.trained():
            step = state["first"] / (state["second"].sqrt() + group["d"] * 1e-8)
            param.sub_(step, alpha=group["d"] * group["lr"])


class Clipping(Stepper):
    """SGD that clips by the norm of all gradients itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        grads = [param.grad for _, param, _ in self.trained()]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for group, param, _ in self.trained():
            param.sub_(param.grad / norm.clamp(min=1.0), alpha=group["lr"])


class InTurn(Stepper):
    """Steps one parameter at a time, each for two steps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count = getattr(self, "count", -1) + 1
        trained = list(self.trained())
        group, param, _ = trained[self.count // 2 % len(trained)]
        param.sub_(param.grad, alpha=group["lr"])


class ScheduleFree(Stepper):
    """SGD that averages instead of a schedule (Defazio and others, "The Road Less Scheduled",
    2024): parameters are ``y`` in training and the average ``x`` in evaluation."""

    def __init__(self, params: Any, lr: float = 0.5, beta: float = 0.9):
        super().__init__(params, lr, beta=beta, steps=0, training=False)

    @torch.no_grad()
    def train(self) -> None:
        self._move(True, lambda beta: 1 - beta)

    @torch.no_grad()
    def eval(self) -> None:
        self._move(False, lambda beta: 1 - 1 / beta)

    def _move(self, training: bool, weight: Callable[[float], float]) -> None:
        for group in self.param_groups:
            for param in group["params"] if group["training"] is not training else ():
                if "z" in self.state[param]:
                    param.lerp_(self.state[param]["z"], weight(group["beta"]))
            group["training"] = training

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not all(group["training"] for group in self.param_groups):
            raise RuntimeError("call train() before step()")
        for group in self.param_groups:
            group["steps"] += 1
        for group, param, state in self.trained():
            if not state:
                state["z"] = param.clone()
            weight = 1 / group["steps"]
            param.lerp_(state["z"], weight)
            param.sub_(param.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - weight)))
            state["z"].sub_(param.grad, alpha=group["lr"])


def _averaged(state: dict[str, Any], key: str, value: torch.Tensor) -> torch.Tensor:
    """An exponential average that begins with the first value."""
    if key not in state:
        state[key] = value.clone()
    average: torch.Tensor = state[key].lerp_(value, 0.1)
    return average


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton and Schulz's iteration towards the nearest matrix with orthogonal rows or columns."""
    made = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = made @ made.T
        made = 3.4445 * made + (-4.7750 * square + 2.0315 * square @ square) @ made
    return made


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """To the power of -1/4."""
    found, basis = torch.linalg.eigh(matrix)
    return basis @ torch.diag(found.clamp(min=1e-6) ** -0.25) @ basis.T
