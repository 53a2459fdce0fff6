"""PipelineTrainer against transformers.Trainer, on one device with the same global batch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
import transformers
from pipecompile.integrations.transformers import PipelineTrainer
from support import tasks

TWO = {"n_stages": 2}


def trained(make: Any, task: str, folder: Path, options: Any = None, **given: Any) -> Any:
    made = tasks.trainer(make, task, tasks.arguments(folder, **options or {}), **given)
    made.train()
    return made


def assert_alike(
    mine: Any, theirs: Any, rel: float = 1e-6, weights: float = 0.0, without: Any = ()
) -> None:
    """Logs within a bound; weights bit for bit, or within another one."""
    pairs = zip(tasks.logged(mine), tasks.logged(theirs), strict=True)
    for ours, expected in pairs:
        assert ours.keys() == expected.keys()
        for key in set(expected) - {"epoch", *without}:
            assert math.isclose(ours[key], expected[key], rel_tol=rel), key
    states = theirs.model.state_dict()
    for name, value in mine.model.state_dict().items():
        assert (value - states[name]).abs().max() <= weights, name


@pytest.mark.filterwarnings("ignore:Bert.* takes .?num_items_in_batch")
@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.slow
def test_logs_metrics_and_weights_are_those_of_trainer(task: str, tmp_path: Path) -> None:
    """Also in the last step of an epoch, which has a batch of two rows."""
    theirs = trained(transformers.Trainer, task, tmp_path / "one")
    mine = trained(PipelineTrainer, task, tmp_path / "many", pipeline=TWO)
    assert_alike(mine, theirs)
    assert mine.pipe.plan.microbatches == 2
    predicted, expected = (each.predict(tasks.rows_of(task, 7)) for each in (mine, theirs))
    assert (predicted.predictions == expected.predictions).all()
    assert predicted.metrics["test_loss"] == expected.metrics["test_loss"]


@pytest.mark.filterwarnings("ignore:Bert.* takes .?num_items_in_batch")
def test_a_few_steps_are_those_of_trainer(tmp_path: Path) -> None:
    """With an evaluation, and a folder that is a model's, of batches of one length."""
    options = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2}
    given = {"data_collator": tasks.collate_alike, "train_dataset": tasks.rows_of("tokens", 16)}
    given["eval_dataset"] = tasks.rows_of("tokens", 8, seed=1)
    theirs = trained(transformers.Trainer, "tokens", tmp_path / "one", options, **given)
    mine = trained(PipelineTrainer, "tokens", tmp_path / "many", options, pipeline=TWO, **given)
    assert_alike(mine, theirs)
    folder = tmp_path / "many" / "checkpoint-4"
    saved = transformers.BertForTokenClassification.from_pretrained(folder)
    states = theirs.model.state_dict()
    for name, value in saved.state_dict().items():
        assert torch.equal(value, states[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Bert.* takes .?num_items_in_batch")
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    """From the middle of an epoch; the folder is one of a model too."""
    options = {"save_steps": 2, "eval_strategy": "no"}
    whole = trained(PipelineTrainer, "classification", tmp_path, options, pipeline=TWO)
    args = tasks.arguments(tmp_path, **options)
    resumed = tasks.trainer(PipelineTrainer, "classification", args, pipeline=TWO)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_alike(resumed, whole, rel=0.0, without=["train_loss"])  # which is of its own steps
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    states = whole.model.state_dict()
    for name, value in saved.state_dict().items():
        assert torch.equal(value, states[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Bert.* takes .?num_items_in_batch")
def test_the_best_model_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the first one, as losses fall
        "save_total_limit": 1,
        "learning_rate": 3e-3,
    }
    mine = trained(PipelineTrainer, "classification", tmp_path, options, pipeline=TWO)
    best = Path(mine.state.best_model_checkpoint)
    assert best.name == "checkpoint-3"
    assert [path.name for path in tmp_path.iterdir()] == [best.name]
    assert mine.evaluate()["eval_loss"] == mine.state.best_metric


@pytest.mark.slow
def test_without_accumulation_the_pipeline_cuts_rows(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 1, "eval_strategy": "no", "max_steps": 3}
    one = options | {"per_device_train_batch_size": 8}
    theirs = trained(transformers.Trainer, "tokens", tmp_path / "one", one)
    mine = trained(PipelineTrainer, "tokens", tmp_path / "many", options, pipeline=TWO | {"dp": 2})
    assert_alike(mine, theirs, rel=1e-5, weights=1e-5)


def cross_entropy(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    flat = outputs.logits.flatten(0, 1), labels.flatten()
    return torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch


@pytest.mark.slow
@pytest.mark.parametrize("smooths", [True, False])
def test_losses_outside_of_the_model(smooths: bool, tmp_path: Path) -> None:
    options = {"eval_steps": 1, "max_steps": 1}
    given: Any = {} if smooths else {"compute_loss_func": cross_entropy}
    if smooths:
        options["label_smoothing_factor"] = 0.1
    task = "causal" if smooths else "tokens"
    theirs = trained(transformers.Trainer, task, tmp_path / "one", options, **given)
    mine = trained(PipelineTrainer, task, tmp_path / "many", options, pipeline=TWO, **given)
    assert_alike(mine, theirs)


class Events(transformers.TrainerCallback):
    """Which have come, and after how many steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def noted(args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seen.append((name, state.global_step))

        return noted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Bert.* takes .?num_items_in_batch")
def test_callbacks_and_length_groups(tmp_path: Path) -> None:
    seen = []
    options = {"max_steps": 4, "train_sampling_strategy": "group_by_length"}
    options |= {"include_num_input_tokens_seen": "non_padding", "lr_scheduler_type": "cosine"}
    for make in (transformers.Trainer, PipelineTrainer):
        given = {"pipeline": TWO} if make is PipelineTrainer else {}
        events = Events()
        made = trained(
            make, "classification", tmp_path / make.__name__, options, callbacks=[events], **given
        )
        seen.append((events.seen, made))
    (theirs, plain), (mine, pipelined) = seen
    assert mine == theirs
    assert_alike(pipelined, plain)
    assert pipelined.state.total_flos == plain.state.total_flos > 0
    assert pipelined.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0


@pytest.mark.parametrize(
    ("options", "pipeline", "name"),
    [
        ({"auto_find_batch_size": True}, TWO, "auto_find_batch_size"),
        ({"neftune_noise_alpha": 5.0}, TWO, "neftune_noise_alpha"),
        ({"bf16": True}, TWO | {"precision": "fp32"}, "precision"),
        ({}, TWO | {"microbatches": 3}, "gradient_accumulation_steps"),
        ({}, TWO | {"max_grad_norm": 1.0}, "max_grad_norm"),
        ({}, {"n_stages": "auto"}, "n_stages"),
        ({"optim": "adafactor_of_nothing"}, TWO, "adafactor_of_nothing"),
        ({"train_sampling_strategy": "batch_rebalance"}, TWO, "batch_rebalance"),
        ({"torch_compile": True, "torch_compile_mode": "max-autotune"}, TWO, "torch_compile_mode"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    options: Any, pipeline: Any, name: str, tmp_path: Path
) -> None:
    with pytest.raises((pipecompile.errors.OptionError, ValueError), match=name):
        tasks.trainer(
            PipelineTrainer, "tokens", tasks.arguments(tmp_path, **options), pipeline=pipeline
        )


def test_objects_of_the_model_are_refused(tmp_path: Path) -> None:
    class Own(PipelineTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any: ...

    args = tasks.arguments(tmp_path)
    with pytest.raises(pipecompile.errors.OptionError, match="compute_loss"):
        tasks.trainer(Own, "tokens", args, pipeline=TWO)
    sgd = torch.optim.SGD(tasks.model_of("tokens").parameters(), lr=0.1)
    with pytest.raises(pipecompile.errors.OptionError, match="optimizers="):
        tasks.trainer(PipelineTrainer, "tokens", args, pipeline=TWO, optimizers=(sgd, None))


SCRIPT = """
import sys
import torch
from support import tasks
from pipecompile.integrations.transformers import PipelineTrainer
folder, task, resumes = sys.argv[1:]
args = tasks.arguments(folder + "/run", save_steps=2, eval_steps=2, use_cpu=task != "causal")
placement = "replicas" if task == "tokens" else "auto"
pipeline = {"n_stages": 2, "dp": 2, "placement": placement}
made = tasks.trainer(PipelineTrainer, task, args, pipeline=pipeline)
made.train(resume_from_checkpoint=folder + "/run/checkpoint-2" if resumes == "yes" else None)
found = made.predict(tasks.rows_of(task, 7))
if made.is_world_process_zero():
    print("writes")
    history, weights = tasks.logged(made), made.model.state_dict()
    torch.save((history, weights, found.predictions), folder + "/found.pt")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Bert.* takes .?num_items_in_batch")
@pytest.mark.parametrize("task", tasks.TASKS)
def test_processes_train_as_one(task: str, tmp_path: Path) -> None:
    """2 stages × 2 replicas under torchrun: as plain python does, and as one device of Trainer."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    found_by = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    found = []
    for resumes in ("no", "yes"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "4", str(script), str(tmp_path), task, resumes]
        done = subprocess.run(command, env=found_by, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines().count("writes") == 1
        found.append(torch.load(tmp_path / "found.pt", weights_only=False))
    (history, weights, predictions), resumed = found
    assert resumed[0][:-1] == history[:-1]  # the last one has the mean loss of its own steps
    assert all(torch.equal(value, weights[name]) for name, value in resumed[1].items())
    options = {"save_steps": 2, "eval_steps": 2, "gradient_accumulation_steps": 4}
    theirs = trained(transformers.Trainer, task, tmp_path / "one", options)
    for ours, expected in zip(history, tasks.logged(theirs), strict=True):
        for key in set(expected) - {"epoch"}:
            assert math.isclose(ours[key], expected[key], rel_tol=1e-5), key
    for name, value in theirs.model.state_dict().items():
        assert (value - weights[name]).abs().max() < 1e-5, name
    expected = theirs.predict(tasks.rows_of(task, 7)).predictions
    assert abs(predictions - expected).max() < 1e-5
