"""Tune learning rate, warm-up and weight decay with Optuna: one compiled pipeline for all trials.

python examples/tune.py                       # run it again: the study goes on where it was
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pipecompile
import torch
from common.compare import train_plain
from common.compression import MICROBATCHES, compared, llama, read_text, sample
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def rise(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup)


def stepping(params: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """What a trial asks for, as `compile` and `restart` take it."""
    return {
        "optimizer": partial(AdamW, lr=params["lr"], weight_decay=params["weight_decay"]),
        "lr_scheduler": partial(LambdaLR, lr_lambda=partial(rise, warmup=params["warmup"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune a small Llama with Optuna.")
    parser.add_argument("--trials", type=int, default=8, help="further ones, in this run")
    parser.add_argument("--steps", type=int, default=30, help="of a trial")
    parser.add_argument("--study", type=Path, default=Path("tune.db"), help="SQLite")
    args = parser.parse_args()
    torch.set_num_threads(1)  # equal numbers need equal threads
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    text, held_out = read_text()
    batches, judged = list(sample(text, args.steps)), next(sample(held_out, 1))
    torch.manual_seed(0)
    model = llama()
    first = {"lr": 1e-3, "warmup": 5, "weight_decay": 0.01}  # also the first trial
    pipe = pipecompile.compile(
        model, n_stages=2, microbatches=MICROBATCHES, **stepping(first), example_batch=batches[0]
    )
    start, programs = pipe.state_dict(), pipe.programs

    def objective(trial: optuna.Trial) -> float:
        params = {
            "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
            "warmup": trial.suggest_int("warmup", 1, args.steps // 2),
            "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
        }
        pipe.restart(start, **stepping(params))  # these weights, a new optimizer, step 0
        for step, batch in enumerate(batches):
            pipe.step(batch)
            trial.report(float(pipe.metrics.loss), step)
            if trial.should_prune():
                raise optuna.TrialPruned(f"after {step + 1} steps")
        return float(pipe.evaluate(judged))

    study = optuna.create_study(
        study_name="llama",
        storage=f"sqlite:///{args.study}",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=4),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=args.steps // 3),
    )
    before = len(study.trials)
    if not before:
        study.enqueue_trial(first)
    study.optimize(objective, n_trials=args.trials)

    for trial in study.trials[before:]:
        shown = ", ".join(f"{name} {value:.2g}" for name, value in trial.params.items())
        steps = len(trial.intermediate_values)
        result = f"{trial.value:.4f}" if trial.state.name == "COMPLETE" else "-"
        print(f"trial {trial.number:2d}  {result:>7}  {steps:3d} steps  {shown}")
    states = [trial.state.name for trial in study.trials]
    print(f"trials: {before} before, {len(states) - before} now, {states.count('PRUNED')} pruned")
    print(f"compiled once: {pipe.programs is programs}")
    print(f"best: trial {study.best_trial.number}, loss {study.best_value:.6f}")

    # the best trial once more: by the pipeline, which other trials have used since, and plainly
    best = study.best_trial
    again = objective(optuna.trial.FixedTrial(best.params))
    print(f"again: {'the same' if again == best.value else 'ANOTHER'} loss, {again:.6f}")
    steps = [[batch] for batch in batches]
    train_plain(model, steps, microbatches=MICROBATCHES, **stepping(best.params))
    print(compared("the best trial", pipe.state_dict(), model.state_dict()))


if __name__ == "__main__":
    main()
