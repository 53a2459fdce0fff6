"""SPEC of `pipecompile inspect` -> a model without weights, a batch for it, and its loss; of
`pipecompile verify` all with values.

``path/to/file.py:function``  the function returns (model, example batch) or, of a model whose
                              output has no loss, (model, example batch, loss_fn)
``hf:llama``                  transformers' default model of that type, changed by ``--set``
``hf:path/to/config.json``    the model of a configuration file
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture.calling import LossFn
from ..ir.errors import OptionError, SpecError
from ..tensors.weightless import without_data
from ..zoo.families import TASKS, class_tables

SEED = 0
DEFAULT_SEQ = 512
DEFAULT_IMAGE_SIZE = 224

_ADVICE = (
    " (tensors have no data here, so that no model is too big: make the batch with torch.zeros, "
    "and read no values)"
)


@dataclass(frozen=True)
class Subject:
    """What is inspected: a model on fake or meta tensors, a batch of all replicas. Or what is run,
    with values."""

    model: nn.Module
    batch: Any
    loss_fn: LossFn | None = None


@dataclass(frozen=True)
class ModelOptions:
    """What shapes an ``hf:`` model; a function in a file decides all of it by itself.

    Attributes:
        settings: ``key=value`` of the configuration, each.
        task: one of `TASKS`, None for the configuration's own.
        rows: of the batch; None for ``default_rows``.
        seq: tokens per row, None for `DEFAULT_SEQ` or the model's longest.
    """

    settings: tuple[str, ...] = ()
    task: str | None = None
    rows: int | None = None
    seq: int | None = None
    default_rows: int = 1

    @property
    def given(self) -> tuple[str, ...]:
        """The flags that were given."""
        flags = ("--set", "--task", "--batch", "--seq")
        values = (self.settings, self.task, self.rows, self.seq)
        return tuple(flag for flag, value in zip(flags, values, strict=True) if value)


def load(spec: str, options: ModelOptions, real: bool = False) -> Subject:
    """Build what SPEC names.

    Args:
        real: with values, drawn from a seed.

    Raises:
        SpecError: there is no such file, function or model type, or it cannot be built.
        OptionError: an option that does not fit the model, or has no effect on it.
    """
    if spec.startswith("hf:"):
        return _from_transformers(spec.removeprefix("hf:"), options, real)
    path, _, function = spec.rpartition(":")
    if not path.endswith(".py") or not function:
        raise SpecError(
            f"SPEC {spec!r} is neither path/to/file.py:function nor hf:MODEL_TYPE nor "
            "hf:path/to/config.json"
        )
    if options.given:
        raise OptionError(
            f"{options.given[0]} has no effect on {spec}: "
            f"{function}() alone decides model and batch"
        )
    return _from_file(Path(path), function, real)


# -- path/to/file.py:function -------------------------------------------------------------------


def _from_file(path: Path, name: str, real: bool) -> Subject:
    if not path.is_file():
        raise SpecError(f"there is no file {str(path)!r}")
    with explained(path, "importing it"):
        module = _import(path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise SpecError(f"{path} has no function {name!r}: {_close(name, known)}")
    with ExitStack() as stack:
        stack.enter_context(explained(path, f"{name}()"))
        if real:
            torch.manual_seed(SEED)
        else:
            stack.enter_context(without_data())
        result = function()
    if isinstance(result, tuple) and len(result) in (2, 3) and isinstance(result[0], nn.Module):
        return Subject(*result)
    raise SpecError(
        f"{path}:{name} returned a {type(result).__name__}: it must return a tuple (model, example "
        "batch) or (model, example batch, loss_fn), the model a torch.nn.Module"
    )


def _import(path: Path) -> Any:
    """The file as a module; like a script's, its folder comes first where modules are sought."""
    name = f"_spec_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


@contextmanager
def explained(path: Path, what: str, passed: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """An error in the user's file becomes one line that names the place in it.

    Args:
        passed: the kind of error that says all by itself.
    """
    try:
        yield
    except passed:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        kind = type(error).__name__
        reads = kind.startswith(("DataDependent", "DynamicOutput")) or ".numpy()" in str(error)
        advice = _ADVICE if reads else ""
        raise SpecError(f"{what} failed at {where} with {kind}: {_line(error)}{advice}") from error


# -- hf: ----------------------------------------------------------------------------------------


def _from_transformers(source: str, options: ModelOptions, real: bool) -> Subject:
    tables = class_tables()
    import transformers

    config = _config(source, options, transformers.CONFIG_MAPPING)
    task = _task(config, options.task, tables)
    _complete(config, task)
    auto = getattr(transformers, TASKS[task][1])
    torch.manual_seed(SEED)
    # on "meta" transformers itself makes every model before loading it
    with torch.device("cpu" if real else "meta"):
        try:
            model = auto.from_config(config)
        except Exception as error:
            raise SpecError(f"transformers cannot build {source}: {_line(error)}") from error
        batch = _batch(model, config, task, options)
    return Subject(model.train(), _drawn(batch, config) if real else batch)


def _config(source: str, options: ModelOptions, mapping: Mapping[str, Any]) -> Any:
    """The configuration with the settings in it.

    They are arguments of the configuration's class, and not set on it afterwards, because other
    fields (head_dim, layer_types) follow from them.
    """
    given = _read_json(Path(source)) if source.endswith(".json") else {"model_type": source}
    model_type = str(given.pop("model_type"))
    if "/" in model_type:
        raise SpecError(
            f"hf:{source} is no model type, and nothing is downloaded: "
            "give the path of the model's config.json"
        )
    if model_type not in mapping:
        raise SpecError(
            f"transformers has no model type {model_type!r}: {_close(model_type, mapping)}"
        )
    kind = mapping[model_type]
    base = _made(kind, given)
    fields = {base.attribute_map.get(key, key): value for key, value in given.items()}
    for setting in options.settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise OptionError(f"--set {setting}: write it as key=value")
        _set(fields, base, key.split("."), _literal(text), setting)
    if options.seq is not None:
        _make_room(fields, base, options.seq)
    return _made(kind, fields)


def _make_room(fields: dict[str, Any], base: Any, seq: int) -> None:
    """Let a default configuration have as many positions as asked for; one that was given stays.

    Raises:
        OptionError: it has fewer.
    """
    name = base.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    longest = fields.get(name, getattr(base, name, None))
    if not isinstance(longest, int) or seq <= longest:
        return
    if name in fields:
        raise OptionError(
            f"--seq {seq} is more than the configuration's {name}={longest}: use a shorter one, "
            f"or --set {name}={seq}"
        )
    fields[name] = seq


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise SpecError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise SpecError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise SpecError(f"{path} is not a transformers configuration: it has no 'model_type'")
    return fields


def _made(kind: Any, fields: dict[str, Any]) -> Any:
    try:
        return kind.from_dict(fields)
    except Exception as error:
        raise OptionError(f"{kind.__name__} refuses its values: {_line(error)}") from error


def _set(
    fields: dict[str, Any], config: Any, path: Sequence[str], value: Any, setting: str
) -> None:
    """Put a value into the arguments of a configuration, or of one inside it.

    Args:
        config: what the arguments make without it: tells which keys there are.
    """
    aliases = getattr(config, "attribute_map", {})
    known = set(config if isinstance(config, dict) else config.to_dict())
    known = (known | set(aliases) | {"num_labels"}) - {"model_type", "transformers_version"}
    if path[0] not in known:
        raise OptionError(
            f"--set {setting}: {type(config).__name__} has no {path[0]!r}: {_close(path[0], known)}"
        )
    key = aliases.get(path[0], path[0])
    if len(path) == 1:
        fields[key] = value
        return
    inner = config[key] if isinstance(config, dict) else getattr(config, key)
    if not isinstance(inner, dict) and not hasattr(inner, "to_dict"):
        raise OptionError(f"--set {setting}: {path[0]} is {inner!r}, which has no parts")
    fields[key] = dict(fields.get(key) or (inner if isinstance(inner, dict) else {}))
    _set(fields[key], inner, path[1:], value, setting)


def _literal(text: str) -> Any:
    """``4``, ``1e-5``, ``true``, ``null``, ``[1, 2]`` and their Python spellings; else a string."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _task(config: Any, wanted: str | None, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The task wanted, that of the configuration's own class, or the first the type has."""
    kind = config.model_type
    having = [task for task in TASKS if kind in tables[task]]
    if wanted is not None and wanted not in having:
        raise OptionError(f"--task {wanted}: {kind} has only {', '.join(having) or 'other tasks'}")
    if not having:
        raise SpecError(f"{kind} has none of the tasks that inspect knows: {', '.join(TASKS)}")
    named = set(config.architectures or ())
    own = [task for task in having if named & set(_classes(tables[task][kind]))]
    usual = [task for task in having if task != "seq2seq-lm" or config.is_encoder_decoder]
    return wanted or (own or usual or having)[0]


def _classes(entry: str | Sequence[str]) -> Sequence[str]:
    return (entry,) if isinstance(entry, str) else entry


def _complete(config: Any, task: str) -> None:
    """Token ids that a model reads while it trains and a default configuration leaves open."""
    names = ["decoder_start_token_id", "pad_token_id"] if config.is_encoder_decoder else []
    if task == "sequence-classification":
        names.append("pad_token_id")
    for name in names:
        if getattr(config, name, None) is None:
            setattr(config, name, 0)


def _batch(model: nn.Module, config: Any, task: str, options: ModelOptions) -> dict[str, Any]:
    rows = options.rows or options.default_rows
    if task == "image-classification":
        if options.seq:
            raise OptionError("--seq has no effect on a model of images")
        size = getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.zeros(rows, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": images, "labels": torch.zeros(rows, dtype=torch.long)}
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_SEQ
    tokens = torch.zeros(rows, options.seq or min(longest, DEFAULT_SEQ), dtype=torch.long)
    labels = tokens[:, 0] if task == "sequence-classification" else tokens
    return {str(getattr(model, "main_input_name", "input_ids")): tokens, "labels": labels.clone()}


def _drawn(batch: dict[str, Any], config: Any) -> dict[str, Any]:
    """With values: images of noise, and tokens and labels of those that there are."""
    tokens = getattr(config.get_text_config(), "vocab_size", None) or 2
    labels = tokens if batch["labels"].dim() > 1 else getattr(config, "num_labels", 2)
    return {
        name: torch.randn(value.shape)
        if value.is_floating_point()
        else torch.randint(0, labels if name == "labels" else tokens, value.shape)
        for name, value in batch.items()
    }


# -- texts --------------------------------------------------------------------------------------


def _close(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 3)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    shown = sorted(known)[:40]
    return f"known are {', '.join(shown)}{', ...' if len(known) > len(shown) else ''}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
