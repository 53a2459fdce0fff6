"""`pipecompile inspect`: the planner's options, automatic stages, plans in files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from pipecompile.compiler.cli.main import main, make_parser
from pipecompile.compiler.cli.request import Request
from pipecompile.compiler.costs.hardware import DEVICES
from support.commands import SMALL_GPT2, inspect, plan_of

# -- the planner's options ----------------------------------------------------------------------


def test_memory_is_a_bar_and_makes_recomputation(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(f"{SMALL_GPT2} --stages 2 --microbatches 4 --memory 2.9MiB", capsys)
    assert re.search(r"0B2 +\[█+░*\] 2\.\d of 2\.9$", report, re.MULTILINE)
    assert re.search(r"memory: at most 2\.\d MiB, on stage \d in .*, \d+% of the budget", report)
    full = inspect(f"{SMALL_GPT2} --stages 2 --microbatches 4 --remat full", capsys)
    again = " ".join(full.split("recomputed in the backward")[1].split("tied weights")[0].split())
    assert re.search(r"stage 0: .*attention.* of \d units? \(of \d\): .*% of its time", again)
    assert "--remat auto recomputes nothing" in " ".join(full.split())
    assert "no limit was given" in full


@pytest.mark.slow
def test_a_budget_that_fp32_would_break(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a plan in mixed precision stands what fp32 would take, which need not fit."""
    command = f"{SMALL_GPT2} --stages 1 --batch 32 --microbatches 1 --precision bf16_params"
    peak = plan_of(command, capsys)["stages"][0]["memory"]["peak"]
    said = inspect(f"{command} --memory {int(1.01 * peak)} --remat none", capsys)
    (line,) = (line for line in said.splitlines() if line.startswith("largest peak"))
    assert float(line.rpartition(" ")[2].rstrip("%")) < -20
    assert "bf16_params: " in said


@pytest.mark.slow
def test_a_7b_model_fits_into_80_gb_with_narrow_parameters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Six rows of 2048 tokens and no recomputation, as in docs/precision.md."""
    command = "hf:llama --stages 1 --dp 64 --zero 3 --seq 2048 --batch 384 --microbatches 1"
    plan = plan_of(f"{command} --device h100 --precision bf16_params", capsys)
    (stage,) = plan["stages"]
    assert not stage["recomputes"]
    assert 66 < stage["memory"]["peak"] / 2**30 < 71


def test_infeasible_memory_is_one_line_with_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *SMALL_GPT2.split(), "--stages", "2", "--memory", "1MiB"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    found = re.match(
        r"pipecompile: error: stage \d needs ([\d.]+) MiB of 1\.0 MiB, ([\d.]+) MiB too much", line
    )
    assert found
    assert float(found[1]) == pytest.approx(1 + float(found[2]), abs=0.11)


@pytest.mark.slow
def test_device_gives_rates_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = plan_of(f"{SMALL_GPT2} --stages 2", capsys)
    fast = plan_of(f"{SMALL_GPT2} --stages 2 --device h100", capsys)
    assert (slow["device"], slow["budget_bytes"]) == ("cpu", None)
    assert (fast["device"], fast["budget_bytes"]) == ("h100", DEVICES["h100"].memory_bytes)
    assert fast["step_s"] < slow["step_s"]
    fields = asdict(DEVICES["l4"]) | {"name": "mine", "memory_bytes": 2**30}
    (tmp_path / "mine.json").write_text(json.dumps(fields))
    mine = plan_of(f"{SMALL_GPT2} --stages 2 --device {tmp_path / 'mine.json'}", capsys)
    assert (mine["device"], mine["budget_bytes"]) == ("mine", 2**30)


@pytest.mark.slow
def test_optimizer_states_are_memory(capsys: pytest.CaptureFixture[str]) -> None:
    states = {
        name: plan_of(f"{SMALL_GPT2} --stages 1 --optimizer {name}", capsys)["stages"][0]["memory"]
        for name in ("adamw", "sgd", "none")
    }
    weights = states["none"]["weights"]
    assert states["adamw"]["states"] >= 2 * weights
    assert states["sgd"]["states"] == states["none"]["states"] == 0


def test_pins_move_modules(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(f"{SMALL_GPT2} --stages 2 --pin transformer.h.0=1", capsys)
    assert "transformer.h" in " ".join(plan["stages"][1]["modules"])
    assert "transformer.h" not in " ".join(plan["stages"][0]["modules"])


def test_solver_and_time_limit_reach_the_planner() -> None:
    arguments = "inspect hf:gpt2 --stages 2 --solver cbc --time-limit 2.5 --remat none"
    options = Request.of(make_parser().parse_args(arguments.split())).options
    assert (options.solver, options.time_limit_s, options.remat) == ("cbc", 2.5, "none")


@pytest.mark.slow
def test_automatic_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every division of the same batch; what memory rules out says why."""
    command = f"{SMALL_GPT2} --stages auto --devices"
    report = inspect(f"{command} 4 --memory 2.9MiB --dump {tmp_path}", capsys)
    table = report.split("ways to use 4 devices\n")[1].split("\n\n")[0]
    assert re.search(r"^[24] × [12] +\d.* chosen$", table, re.MULTILINE)
    said = " ".join(table.split())
    assert re.search(r"not possible: 1 × dp 4: .* needs .* of 2\.9 MiB", said)
    counts = r"\d+ ways: \d+ cannot be better by their bounds, \d+ cannot fit, \d+ sketched, \d+ pl"
    assert re.search(counts, said)
    assert "16 rows per step" in " ".join(report.split())
    assert len(list(tmp_path.iterdir())) == 1  # of the chosen division only
    unlimited = inspect(f"{command} 2", capsys)
    assert "1 stage × dp 2 = 2 ranks" in unlimited


def test_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{SMALL_GPT2} --stages 2 --microbatches 4 --memory 2.9MiB"
    report = inspect(f"{command} --compare uniform,all-or-nothing", capsys)
    table = report.split("compared at the problem's prices")[1].split("\n\n")[0]
    assert re.search(r"^this plan .* 1\.000 × .* yes ", table, re.MULTILINE)
    assert re.search(r"^uniform .* [\d.]+ [KM]iB +3 3$", table, re.MULTILINE)
    assert re.search(r"^all-or-nothing ", table, re.MULTILINE)


# -- plans in files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the small GPT-2 on two stages."""
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    assert (
        main(["inspect", *SMALL_GPT2.split(), "--stages", "2", "--save", str(file), "--json"]) == 0
    )
    return file


def test_a_saved_plan_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its stages, replicas, microbatches, rows and budget, and to the byte."""
    file = tmp_path / "plan.json"
    shape = "--stages 2 --dp 2 --microbatches 2 --batch 8 --schedule zb_h1 --memory 4MiB"
    made = inspect(f"{SMALL_GPT2} {shape} --save {file} --json", capsys)
    assert file.read_text() == made
    assert inspect(f"{SMALL_GPT2} {shape} --json", capsys) == made
    assert inspect(f"{SMALL_GPT2} --plan {file} --json", capsys) == made
    report = inspect(f"{SMALL_GPT2} --plan {file}", capsys)
    assert "dynamic program, read from a file" in " ".join(report.split())
    assert "of 4.0" in report


@pytest.mark.slow
def test_what_a_plan_keeps_need_not_be_given_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    kept = "--schedule zb_h1 --tied-grads per_step --precision bf16 --zero 2"
    shape = f"{SMALL_GPT2} --stages 2 --dp 2 --microbatches 2 {kept}"
    made = inspect(f"{shape} --save {file} --json", capsys)
    assert inspect(f"{SMALL_GPT2} --plan {file} --json", capsys) == made


@pytest.mark.parametrize(
    ("command", "message"),
    [
        pytest.param(
            "hf:gpt2 --set n_layer=3 --seq 16 --plan {plan}",
            "the plan was made for microbatches of",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "{small} --set n_layer=3 --plan {plan}",
            "the plan was made for another model",
            marks=pytest.mark.slow,
        ),
        ("{small} --plan {plan} --stages 3", "the plan has n_stages=2, this run .*3"),
        ("{small} --plan {plan} --stages auto --devices 2", "--plan cannot be given with --stages"),
        ("{small} --plan {plan} --schedule zb_h1", "the plan has schedule=1f1b, this run .*zb_h1"),
        pytest.param(
            "{small} --plan {plan} --precision bf16",
            "the plan has precision=as it is, this .*=bf16",
            marks=pytest.mark.slow,
        ),
        ("{small} --plan {plan} --remat none", "remat= has no effect beside plan="),
        ("{small} --plan {plan} --memory 1GiB", "memory= has no effect beside plan="),
        ("{small} --plan {plan} --compare uniform", "--compare has no effect beside --plan"),
        ("{small} --plan {plan} --device h100", "the plan has device=cpu, this run device=h100"),
        ("{small} --plan {broken}", "broken.json is damaged: .*; make a new plan"),
        ("{small} --plan {folder}/list.json", "list.json is not a plan"),
        ("{small} --plan absent.json", "cannot read the plan 'absent.json'"),
    ],
)
def test_plans_that_do_not_fit(
    command: str,
    message: str,
    saved: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved.with_name("list.json").write_text("[1, 2]")
    broken = saved.with_name("broken.json")
    broken.write_text(saved.read_text()[:1000])
    places = {"plan": saved, "broken": broken, "folder": saved.parent, "small": SMALL_GPT2}
    assert main(["inspect", *command.format(**places).split()]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert re.match(f"pipecompile: error: .*{message}", line), line


@pytest.mark.slow
def test_what_fits_in_bf16_alone_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The same stages in fp32, beside it, may need more than there is."""
    command = f"{SMALL_GPT2} --stages 2 --batch 8 --seq 1024 --precision bf16 --remat none"
    loose = plan_of(command, capsys)
    peak = max(stage["memory"]["peak"] for stage in loose["stages"])
    report = inspect(f"{command} --memory {peak + 4096}", capsys)
    assert "mixed precision" in report
