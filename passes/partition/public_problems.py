"""Planning problems in two public file formats -> `compiler.ir.problem.Problem`.

device graphs   msr-fiddle/dnn-partitioning (Tarnawski et al., "Efficient Algorithms for
                Device Placement of DNN Graph Operators", NeurIPS 2020). Accelerators only:
                what the files say of CPUs is not used.
layer plans     msr-fiddle/piper (Tarnawski et al., "Piper: Multidimensional Planner for DNN
                Parallelization", NeurIPS 2021), without data and tensor parallelism.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...compiler.ir.errors import ProblemFileError
from ...compiler.ir.problem import Option, Problem, Value

GIB = 2**30

_PIPER_STAGES, _PIPER_GIB = 8, 8.0
_PIPER_LINK = 25 * GIB  # bytes/s


def files_of(paths: Iterable[str]) -> list[Path]:
    """The files, and the *.json files of the folders, by name.

    Raises:
        ProblemFileError: a path is neither, or a folder has no such file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise ProblemFileError(f"the folder {str(path)!r} has no *.json file")
        found += inside
    for path in found:
        if not path.is_file():
            raise ProblemFileError(f"there is no file {str(path)!r}")
    return found


def read(path: Path, *, n_stages: int | None = None, memory_gib: float | None = None) -> Problem:
    """The problem in a file.

    Args:
        n_stages: devices; the file's own number, or 8, where None.
        memory_gib: of every device; the file's own, or 8, where None.

    Raises:
        ProblemFileError: the file is not in one of the two formats.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProblemFileError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    memory = None if memory_gib is None else memory_gib * GIB
    try:
        if isinstance(data, dict) and "maxFPGAs" in data:
            return _device_graph(data, n_stages, memory)
        if isinstance(data, dict) and any("TMPCs" in node for node in data["nodes"]):
            return _layer_plan(data, n_stages, memory)
    except KeyError as error:
        raise ProblemFileError(f"{str(path)!r}: {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ProblemFileError(f"{str(path)!r}: {error}") from error
    raise ProblemFileError(
        f"{str(path)!r} is neither a device graph (with maxFPGAs) nor a layer plan (nodes with "
        "TMPCs)"
    )


def _device_graph(data: Mapping[str, Any], n_stages: int | None, memory: float | None) -> Problem:
    """Forward edges give the order; nodes of one class, backward ones too, go together."""
    nodes = data["nodes"]
    number = {node["id"]: i for i, node in enumerate(nodes)}
    backward = {number[node["id"]] for node in nodes if node.get("isBackwardNode")}
    classes: dict[Any, list[int]] = {}
    for i, node in enumerate(nodes):
        if node.get("colorClass") is not None:
            classes.setdefault(node["colorClass"], []).append(i)
    edges: list[tuple[int, int]] = []
    readers: dict[int, list[int]] = {}
    cost_s: dict[int, float] = {}
    for edge in data["edges"]:
        u, v = number[edge["sourceId"]], number[edge["destId"]]
        if u not in backward and v not in backward:
            edges.append((u, v))
        readers.setdefault(u, []).append(v)
        cost_s[u] = max(cost_s.get(u, 0.0), float(edge["cost"]))
    stages = n_stages or int(data["maxFPGAs"])
    budget = float(data["maxSizePerFPGA"]) if memory is None else memory
    return Problem(
        tuple((Option(float(n["fpgaLatency"]), static_bytes=float(n["size"])),) for n in nodes),
        tuple(edges),
        stages,
        tuple(Value(u, tuple(vs), cost_s[u], cost_s[u]) for u, vs in readers.items()),
        together=tuple(tuple(units) for units in classes.values() if len(units) > 1),
        budget_bytes=(budget,) * stages,
        labels=tuple(str(node.get("name", node["id"])) for node in nodes),
    )


def _layer_plan(data: Mapping[str, Any], n_stages: int | None, memory: float | None) -> Problem:
    """Times per sample; stage s of k holds k − s microbatches' activations."""
    nodes = data["nodes"]
    number = {node["id"]: i for i, node in enumerate(nodes)}
    stages = n_stages or _PIPER_STAGES
    options = tuple(
        tuple(
            Option(
                float(way["timePerSample"]),
                stash_bytes=float(way["memoryUsageA"]),
                static_bytes=float(way["memoryUsageB"]),
                name=str(way["id"]),
            )
            for way in node["TMPCs"]["1"]
        )
        for node in nodes
    )
    values = []
    for edge in data["edges"]:
        seconds = 2 * float(edge["communicationCost"]) / _PIPER_LINK  # there, the gradient back
        values.append(Value(number[edge["sourceId"]], (number[edge["destId"]],), seconds, seconds))
    return Problem(
        options,
        tuple((value.source, value.readers[0]) for value in values),
        stages,
        tuple(values),
        in_flight=tuple(stages - s for s in range(stages)),
        budget_bytes=(_PIPER_GIB * GIB if memory is None else memory,) * stages,
        labels=tuple(str(node.get("name", node["id"])) for node in nodes),
    )
