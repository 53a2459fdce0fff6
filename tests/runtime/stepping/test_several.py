"""Several optimizers that step as one, by rules of names and shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile import Several
from pipecompile.errors import CheckpointError, OptionError
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from support.optimizers import Muon, Prodigy
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

ADAM = partial(torch.optim.Adam, lr=1e-2)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def decaying(named: Any) -> torch.optim.Optimizer:
    params = [p for _, p in named]
    groups = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    return torch.optim.AdamW([{"params": g, "weight_decay": 0.1 * i} for i, g in enumerate(groups)])


RULES = Several(
    ("*wte*", ADAM), (lambda n, p: n.endswith("weight") and p.dim() == 2, SGD), ("*", decaying)
)
WHOLE = Several(("*w?e.weight", ADAM), (lambda n, p: p.dim() == 2, Muon), ("*", SGD))
BATCHES = models.batches("gpt2", 8, 5)


def plainly(steps: int = 5) -> Any:
    model = models.build("gpt2")
    named = list(model.named_parameters())
    embedding = [p for n, p in named if "wte" in n]
    matrices = [p for n, p in named if "wte" not in n and n.endswith("weight") and p.dim() == 2]
    taken = {id(p) for p in (*embedding, *matrices)}
    made = [
        ADAM(embedding),
        SGD(matrices),
        decaying([(n, p) for n, p in named if id(p) not in taken]),
    ]
    rates = [LambdaLR(each, lambda step: 1 / (1 + step)) for each in made]
    losses = []
    for batch in BATCHES[:steps]:
        losses.append(plain.accumulate(model, batch, 1, 4))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for each in (*made, *rates):
            each.step()
    return losses, dict(model.state_dict())


def compiled(n_stages: int, dp: int, rules: Any = RULES, **options: Any) -> Any:
    options = {"max_grad_norm": 0.1} | options
    pipe = jobs.pipeline(
        "gpt2",
        n_stages,
        dp,
        4 // dp,
        optimizer=rules,
        lr_scheduler=partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
        **options,
    )
    pipe.compile_for(plain.cut(BATCHES[0], pipe.data_shards)[0])
    return pipe


def train(pipe: Any, first: int = 0, last: int = 5) -> Any:
    shares = [plain.cut(batch, pipe.data_shards)[pipe.data_shard] for batch in BATCHES[first:last]]
    return [pipe.step(each) for each in shares], pipe.state_dict()


def trained(n_stages: int, dp: int, folder: Path, rules: Any = RULES, **options: Any) -> Any:
    pipe = compiled(n_stages, dp, rules, **options)
    train(pipe, 0, 3)
    pipe.save(folder)
    return train(pipe, 3)


def resumed(n_stages: int, dp: int, folder: Path, rules: Any = RULES, **options: Any) -> Any:
    pipe = compiled(n_stages, dp, rules, **options)
    assert pipe.load(folder) == 3
    return train(pipe, 3)


@pytest.mark.parametrize("n_stages", quickly([3], [1, 2, 3]))
def test_the_bits_of_several_beside_each_other(n_stages: int) -> None:
    """With a schedule and clipping; a stage may have no parameter for one of them."""
    assert plain.equal(train(compiled(n_stages, 1)), plainly())


def test_saved_and_resumed_under_another_division(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    expected = plainly()
    for losses, state in gang(2).run(trained, 2, 1, tmp_path):
        assert plain.equal((losses, state), (expected[0][3:], expected[1]))
    assert plain.equal(resumed(1, 1, tmp_path)[1], expected[1])
    assert plain.equal(resumed(3, 1, tmp_path)[1], expected[1])


@pytest.mark.parametrize(
    ("zero", "rules", "by"),
    quickly(
        [(2, RULES, "rows")],
        [
            (zero, rules, by)
            for zero in (1, 2, 3)
            for rules, by in ((RULES, "rows"), (WHOLE, "matrices"))
        ],
    ),
)
def test_replicas_divide_them(
    gang: Callable[[int], Gang], tmp_path: Path, zero: int, rules: Any, by: str
) -> None:
    """Whole parameters for all of them where one needs that."""
    name = "rules" if rules is RULES else "whole"
    one = divided(name, zero, tmp_path / "one")
    assert one[0] == by
    for found in gang(2).run(divided, name, zero, tmp_path / "two"):
        assert plain.equal(found, one)


def divided(name: str, zero: int, folder: Path) -> Any:
    """Saved and resumed in between; without a norm, which is another one there."""
    rules = RULES if name == "rules" else WHOLE
    options = {"zero": zero, "max_grad_norm": None}
    trained(1, 2, folder, rules, **options)
    pipe = compiled(1, 2, rules, **options)
    pipe.load(folder)
    by = "matrices" if pipe._session.state.zero.matrices else "rows"
    return by, train(pipe, 3)


def test_one_that_looks_at_all_parameters_is_refused() -> None:
    with pytest.raises(OptionError, match="depends on"):
        compiled(2, 1, Several(("*wte*", Prodigy), ("*", Prodigy)))


@pytest.mark.slow
def test_a_load_that_fails_changes_none_of_them(tmp_path: Path) -> None:
    pipe = compiled(2, 1)
    train(pipe, 0, 1)
    pipe.checkpoint_extras["odd"] = Odd()
    pipe.save(tmp_path)
    train(pipe, 1, 2)
    other = compiled(2, 1)
    train(other, 0, 2)
    with pytest.raises(CheckpointError, match="does not take"):
        pipe.load(tmp_path)
    assert plain.equal(train(pipe, 2, 4), train(other, 2, 4))


class Odd:
    def state_dict(self) -> dict[str, int]:
        return {"a": 1}

    def load_state_dict(self, state: Any) -> None:
        raise ArithmeticError


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "was given nothing"),
        ((SGD,), "give pairs"),
        (((3, SGD),), "the rule 3"),
        ((("*", SGD([nn.Parameter(torch.ones(1))])),), "was given an optimizer, SGD"),
        ((("*", "sgd"),), "is not callable"),
    ],
)
def test_parts_that_are_none(parts: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Several(*parts)


def test_a_parameter_that_no_rule_takes() -> None:
    with pytest.raises(OptionError, match="no rule of Several"):
        compiled(2, 1, Several(("*wte*", ADAM)))


def test_a_closure_has_no_place() -> None:
    pipe = compiled(1, 1)
    with pytest.raises(OptionError, match="no closure"):
        pipe.optimizer.step(lambda: 0.0)
