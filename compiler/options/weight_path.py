"""What ``weights=`` names: one safetensors file, or the index of several."""

from __future__ import annotations

from pathlib import Path

from ..ir.errors import OptionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def locate_weights(path: str | Path) -> Path:
    """The safetensors file, or the index file, that a path stands for.

    Args:
        path: a ``.safetensors`` file, or a folder with one, or with several and their index, as
            Hugging Face's ``save_pretrained`` writes them.

    Raises:
        OptionError: there is no such file.
    """
    if not isinstance(path, str | Path):
        raise OptionError(f"weights={path!r}: give the path of a .safetensors file or its folder")
    given = Path(path)
    if given.is_file():
        if given.suffix == ".safetensors" or given.name.endswith(".safetensors.index.json"):
            return given
        raise OptionError(
            f"weights={str(path)!r} is no .safetensors file: write one with "
            "safetensors.torch.save_file, or save_pretrained"
        )
    if not given.is_dir():
        raise OptionError(
            f"weights={str(path)!r} does not exist: give the path of a .safetensors file or its "
            "folder, not the name of a model"
        )
    for name in (SINGLE, INDEX):
        if (given / name).is_file():
            return given / name
    files = sorted(given.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:3])
        raise OptionError(
            f"weights={str(path)!r} has {f'{names} and no {INDEX}' if files else 'no .safetensors'}"
            f"{': name one file' if files else ' file'}"
        )
    return files[0]
