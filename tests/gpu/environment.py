"""What `make gpu` runs in: the Python that has torch, and what is missing beside it.

    python tests/gpu/environment.py download WHEELS [--python 3.12]
    python tests/gpu/environment.py make FOLDER WHEELS

The first fills a folder with wheels, on a machine with network. The second makes an environment
that sees the packages of this Python, torch among them, and installs what these lack out of the
folder, without network. torch itself is never asked for.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ("pytest", "hypothesis")  # of the dev extra, what tests/gpu needs
TORCHS = ("torch", "accelerate")  # which requires it: gigabytes, and only a Trainer needs it
OLDEST = (2, 11)  # torch


def needed() -> list[str]:
    """What the library, its models and the tests here require, but for torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tests = [each for each in extras["dev"] if each.startswith(TESTS) and "xdist" not in each]
    every = [*project["dependencies"], *extras["hf"], *tests]
    return [each for each in every if not each.startswith(TORCHS)]


def download(wheels: Path, python: str) -> list[str]:
    """The command that fills a folder, by the pins of constraints.txt."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--dest", str(wheels)]
    command += ["--only-binary=:all:", "--constraint", str(ROOT / "constraints.txt")]
    if python:
        command += ["--python-version", python]
    return [*command, *needed()]


def install(python: Path, wheels: Path) -> list[str]:
    """The command that installs what an environment lacks, out of a folder alone."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    return [*command, "--no-index", "--find-links", str(wheels), *needed()]


def make(folder: Path, wheels: Path) -> None:
    """An environment over this Python, in which ``import pipecompile`` finds this checkout.

    Raises:
        SystemExit: torch is missing or too old, or a package is neither there nor in the folder.
    """
    found = _torch_version()
    if found is None or found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        sys.exit(f"{sys.executable} needs torch {oldest} or later: say which, GPU_PYTHON=PATH")
    venv.create(folder, system_site_packages=True, clear=True, symlinks=True)
    inside = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # that of this Python, which may be in an environment itself; and the package by its name
    paths = [*(p for p in sys.path if p.endswith("-packages")), str(folder.resolve() / "path")]
    (site / "beside.pth").write_text("\n".join(paths) + "\n")
    (folder / "path").mkdir()
    (folder / "path" / "pipecompile").symlink_to(ROOT)
    wheels.mkdir(exist_ok=True)
    if subprocess.run(install(inside, wheels), check=False).returncode:
        sys.exit(
            f"what is missing is not in {wheels}: run `make gpu-wheels` on a machine with network, "
            f"with GPU_WHEELS_PYTHON={sysconfig.get_python_version()}, and bring the folder here"
        )


def _torch_version() -> tuple[int, ...] | None:
    """(major, minor) of the torch that this Python finds."""
    from importlib import metadata

    try:
        return tuple(int(part) for part in metadata.version("torch").split(".")[:2])
    except metadata.PackageNotFoundError:
        return None


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("download", "make"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--python", default="", help="the version that the wheels are for")
    told = parser.parse_args(given)
    if told.what == "make":
        make(*told.folders)
    else:
        subprocess.run(download(told.folders[0], told.python), check=True)


if __name__ == "__main__":
    main()
