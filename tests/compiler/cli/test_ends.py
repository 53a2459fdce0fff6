"""How the process of a command ends: at once, and nothing that is still to be done is left out."""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = """
import atexit, logging.handlers, os, sys, threading, time
from pipecompile.compiler.cli import main as cli

class Made:
    def __del__(self, write=os.write):
        write(1, b"taken apart")

def command():
    sys.made = Made()
    atexit.register(print, "at exit")
    late = logging.handlers.MemoryHandler(1000, target=logging.StreamHandler(sys.stdout))
    logging.getLogger().addHandler(late)
    logging.getLogger().warning("logged")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("x" * 300_000)
    {end}

cli.main = command
cli.run()
"""


def ended(end: str, **streams: int) -> tuple[int, list[str], str]:
    """Exit status, lines, and what is on stderr."""
    code = COMMAND.replace("{end}", end)
    streams = {"stdout": subprocess.PIPE} | streams
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **streams
    )
    out, told = process.communicate(timeout=60)
    return process.returncode, (out or "").splitlines(), told


def test_all_that_is_to_be_done_is_done_and_nothing_is_taken_apart() -> None:
    code, lines, told = ended("return 3")
    assert (code, told) == (3, "")
    assert lines == ["x" * 300_000, "thread", "at exit", "logged"]


def test_an_error_ends_as_it_would_in_any_program() -> None:
    code, lines, told = ended("raise RuntimeError('not foreseen')")
    assert code == 1
    assert "RuntimeError: not foreseen" in told
    assert {"thread", "at exit", "logged"} <= set(lines)


def test_a_reader_that_has_gone_is_told_of() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        code, _, told = ended("return 0", stdout=writer)
    finally:
        os.close(writer)
    assert code
    assert "BrokenPipeError" in told
