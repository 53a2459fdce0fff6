"""What is printed fits 80 columns, whatever is shown."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.report import tables
from pipecompile.compiler.report.report import PLAIN_WIDTH, write_report
from rich.console import Console
from support.commands import SMALL_GPT2, inspect
from support.plans import EXTRAS, hand_made

LLAMA = (
    "hf:llama --set hidden_size=64 --set intermediate_size=128 --set num_hidden_layers=4 "
    "--set num_attention_heads=4 --set num_key_value_heads=2 --set vocab_size=256 --seq 16"
)
T5 = (
    "hf:t5 --set d_model=32 --set d_kv=16 --set d_ff=64 --set num_layers=2 --set num_heads=2 "
    "--set vocab_size=256 --seq 16"
)


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize(
    "command",
    [
        f"{SMALL_GPT2} --stages 2 --dp 2 --microbatches 4 --memory 3.2MiB --passes "
        "--compare uniform,sequential,parameters",
        pytest.param(
            f"{LLAMA} --stages 4 --schedule interleaved --precision bf16 --memory 1MiB --dp 2 "
            "--zero 1 --device h100 --compare uniform",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            f"{SMALL_GPT2} --stages auto --devices 2 --training false --batch 4 --memory 2MiB "
            "--precision bf16 --passes",
            marks=pytest.mark.slow,
        ),
        pytest.param(f"{LLAMA} --stages 2 --schedule zb_v --memory 64GB", marks=pytest.mark.slow),
        pytest.param(
            f"{T5} --stages auto --devices 4 --memory 4MiB --batch 8", marks=pytest.mark.slow
        ),
        pytest.param(f"{LLAMA} --stages 2 --compare schedules", marks=pytest.mark.slow),
    ],
)
def test_reports(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect(command, capsys)
    assert widest(text) <= 80
    assert "…" not in text  # nothing was cut off


def test_everything_that_a_report_may_have() -> None:
    stream = io.StringIO()
    write_report(*hand_made(), stream, EXTRAS)
    assert widest(stream.getvalue()) <= PLAIN_WIDTH == 80


CELLS = st.text("abc 1.", min_size=1, max_size=30).map(str.strip).filter(bool)


@settings(max_examples=40)
@given(
    st.integers(1, 3).flatmap(
        lambda rows: st.lists(st.lists(CELLS, min_size=rows, max_size=rows), min_size=1, max_size=9)
    )
)
def test_tables_of_any_kind(cells: list[list[str]]) -> None:
    """None is too wide, and every cell is in it."""
    columns = {f"head {i}": each for i, each in enumerate(cells)}
    console = Console(file=io.StringIO(), width=80, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(tables.table(columns, 80))
    text = captured.get()
    assert widest(text) <= 80
    assert all(word in text for each in cells for cell in each for word in cell.split())


def test_lines_of_long_words() -> None:
    assert widest(str(tables.lines("t" * 200, ["w" * 200, "a b " * 50], 80, "- "))) <= 80
