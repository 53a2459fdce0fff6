"""Plants every fault of `planted` in a copy of the package, and runs the test that must fail.

    PYTHONPATH=tests python -m mutants.run [--jobs N] [WORD ...]

With words, only the faults that have one of them in their reason, module or test. Ends with 0 if
all are caught: the test fails with the fault, and passes without any.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mutants.planted import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
FOLDERS = ("compiler", "passes", "runtime")
PASSED, FAILED = 0, 1  # pytest's exit status; all others mean that it could not run the test
LIMIT_S = 300


class NotPlantedError(Exception):
    """The source, or the test, is not found, or found in several places."""


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; ``text`` is what there is to see where it was not caught."""

    mutant: Mutant
    caught: bool
    seconds: float
    text: str = ""

    def __str__(self) -> str:
        word = "caught" if self.caught else "MISSED"
        line = f"{word} {self.seconds:6.1f} s  {self.mutant.module}: {self.mutant.why}"
        return line if self.caught else f"{line}\n{self.text}"


def pattern_of(source: str) -> re.Pattern[str]:
    """Whole lines or parts of one, whatever their indentation is."""
    lines = [re.escape(line.strip()) for line in source.strip().splitlines()]
    return re.compile(r"[ \t]*\n[ \t]*".join(lines))


def planted(mutant: Mutant, package: Path) -> tuple[Path, str]:
    """The file with the fault, and its new text.

    The source stands in its module; if that has moved, in exactly one place of the package.

    Raises:
        NotPlantedError: it does not.
    """
    pattern = pattern_of(mutant.old)
    files = [package / mutant.module]
    if not files[0].is_file() or len(pattern.findall(files[0].read_text())) != 1:
        files = [path for folder in FOLDERS for path in sorted((package / folder).rglob("*.py"))]
    found = [(path, match) for path in files for match in pattern.finditer(path.read_text())]
    if len(found) != 1:
        places = ", ".join(str(path.relative_to(package)) for path, _ in found) or "nowhere"
        raise NotPlantedError(f"{mutant.old!r} is found {len(found)} times: {places}")
    path, match = found[0]
    text = path.read_text()
    indent = re.search(r"[ \t]*$", text[: match.start()])
    lines = textwrap.dedent(mutant.new).strip().splitlines()
    new = f"\n{indent[0] if indent else ''}".join(lines)
    return path, text[: match.start()] + new + text[match.end() :]


def arguments_of(test: str) -> str:
    """A test's file name, with ``::`` and a function or without -> pytest's argument."""
    name, separator, function = test.partition("::")
    found = list(TESTS.rglob(name))
    if len(found) != 1:
        raise NotPlantedError(f"there are {len(found)} files {name} below {TESTS}")
    return f"{found[0]}{separator}{function}"


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the package in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        package = Path(folder) / "pipecompile"
        for name in FOLDERS:
            shutil.copytree(ROOT / name, package / name)
        for path in ROOT.glob("*.py"):
            shutil.copy2(path, package)
        yield package


def run(package: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Pytest's exit status and output, with a copy as the package."""
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(package.parent / "examples"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--hypothesis-profile=mutants", *tests]
    if all("::" in each for each in tests):
        command += ["-m", "not bench"]  # whoever names a test has a slow one too
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {LIMIT_S} s"
    return done.returncode, done.stdout + done.stderr


def tried(mutant: Mutant) -> Outcome:
    start = time.monotonic()
    try:
        with copied() as package:
            path, text = planted(mutant, package)
            path.write_text(text)
            status, output = run(package, [arguments_of(mutant.test)])
    except NotPlantedError as error:
        return Outcome(mutant, False, 0.0, str(error))
    return Outcome(mutant, status == FAILED, time.monotonic() - start, output[-2000:])


def chosen(words: Sequence[str]) -> list[Mutant]:
    def has(mutant: Mutant, word: str) -> bool:
        return any(word in text for text in (mutant.why, mutant.module, mutant.test))

    return [m for m in MUTANTS if not words or any(has(m, word) for word in words)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    mutants = chosen(given.words)
    tests = sorted({arguments_of(mutant.test) for mutant in mutants})
    with copied() as package:
        status, output = run(package, tests)
    if status != PASSED:
        print(f"without any fault the tests do not pass:\n{output[-4000:]}")
        return 1
    with ThreadPoolExecutor(given.jobs) as pool:
        outcomes = []
        for outcome in pool.map(tried, mutants):
            print(outcome, flush=True)
            outcomes.append(outcome)
    missed = sum(not outcome.caught for outcome in outcomes)
    print(f"{len(outcomes) - missed} of {len(outcomes)} faults are caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
