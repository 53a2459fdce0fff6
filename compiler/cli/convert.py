"""`pipecompile export` and `import`: between checkpoints and Hugging Face's files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import SpecError
from ..options.parsing import parse_bytes
from ..report.quiet import quiet

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from .flags import Parser


def add_to(commands: _SubParsersAction[Parser]) -> None:
    _add_export(commands)
    _add_import(commands)


def _add_export(commands: _SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "export",
        help="write a checkpoint's weights for from_pretrained",
        description="Write the weights of a checkpoint as Hugging Face safetensors files, and the "
        "model's config.json, for from_pretrained; of a model with peft's adapters these alone, "
        "for PeftModel.from_pretrained. One tensor at a time is in memory.",
    )
    parser.set_defaults(run=_export)
    parser.add_argument("directory", metavar="DIR", help="what pipe.save() wrote to")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--config",
        metavar="FILE_OR_SPEC",
        help="a config.json, or a model as `inspect` takes it, for OUT/config.json (default: the "
        "configuration of the model that was saved)",
    )
    parser.add_argument(
        "--shard-size",
        metavar="BYTES",
        help="the most that one file holds, if no tensor is larger (default: 5GB)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--adapter",
        metavar="NAME",
        help="one of several adapters, into OUT itself (default: all; those that are not named "
        "'default' into folders with their names)",
    )
    which.add_argument(
        "--whole",
        action="store_true",
        help="all weights of a model with adapters, under their names in it",
    )


def _export(args: argparse.Namespace) -> int:
    from ...runtime.interchange.adapter_files import export_adapters, has_adapters
    from ...runtime.interchange.huggingface import export

    directory, out = Path(args.directory), Path(args.out)
    shard_bytes = parse_bytes(args.shard_size or "5GB", "--shard-size")
    adapters = args.adapter is not None or (not args.whole and has_adapters(directory))
    for option, given in (("--config", args.config), ("--shard-size", args.shard_size)):
        if adapters and given is not None:
            raise SpecError(f"{option} is of all weights, and adapters are written: add --whole")
    if adapters:
        files = export_adapters(directory, out, args.adapter)
    else:
        config = None if args.config is None else _config(args.config)
        files = export(directory, out, config, shard_bytes)
    for path in files:
        print(path)
    return 0


def _config(source: str) -> dict[str, Any]:
    """The configuration in a JSON file, or of the model that a SPEC names."""
    from ...runtime.checkpoint.snapshot import config_of
    from ...runtime.interchange.writing import read_object
    from ..subjects.spec import ModelOptions, load

    if source.endswith(".json") and not source.startswith("hf:"):
        return read_object(Path(source))
    with quiet():
        config = config_of(load(source, ModelOptions()).model)
    if config is None:
        raise SpecError(f"the model of {source} has no configuration: give a config.json")
    return config


def _add_import(commands: _SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "import",
        help="make a checkpoint of a model's safetensors files",
        description="Make a checkpoint of Hugging Face safetensors files: weights alone, with "
        "which pipe.load() begins a training. One tensor at a time is in memory.",
    )
    parser.set_defaults(run=_import)
    parser.add_argument("source", metavar="SRC", help="a folder of save_pretrained, or a file")
    parser.add_argument("directory", metavar="DIR", help="a folder without checkpoints")


def _import(args: argparse.Namespace) -> int:
    from ...runtime.interchange.huggingface import import_

    print(import_(Path(args.source), Path(args.directory)))
    return 0
