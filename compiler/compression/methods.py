"""Methods of compression, what they are called, and for what each can be used.

==========  =====================================================================================
bf16        each number in 16 bits, rounded to bfloat16
int8        each number in 8 bits, and a scale for as many as follow each other
powersgd    matrices as products of two narrow ones; Vogels, Karimireddy & Jaggi, NeurIPS 2019
adacomp     the largest numbers of each bin alone, as signs; Chen et al., AAAI 2018
==========  =====================================================================================

Nothing here imports torch: ``--help`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.errors import OptionError

OFF = "off"


@dataclass(frozen=True)
class Kind:
    """Of methods.

    Attributes:
        number: what may follow its name, after a colon; "" for nothing.
        usual: of that number.
        values: whether it is for values between stages too, and not for gradients alone.
    """

    number: str = ""
    usual: int = 0
    least: int = 1
    most: int = 1
    values: bool = False


KINDS = {
    "bf16": Kind(values=True),
    "int8": Kind(values=True),
    "powersgd": Kind("rank", 4, 1, 1024),
    "adacomp": Kind("numbers per bin", 512, 8, 16384),
}


@dataclass(frozen=True)
class Method:
    """One of them.

    Attributes:
        number: PowerSGD's rank, or how many numbers AdaComp's bins have.
    """

    name: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.number}" if self.number else self.name


@dataclass(frozen=True)
class Compression:
    """What is compressed, and how; None for as it is.

    Attributes:
        gradients: between replicas.
        values: between stages, gradients of these values too.
    """

    gradients: Method | None = None
    values: Method | None = None

    def __str__(self) -> str:
        chosen = {name: method for name, method in vars(self).items() if method is not None}
        return ",".join(f"{name}={method}" for name, method in chosen.items()) or OFF

    def check_values(self, rounded: int, n_stages: int) -> None:
        """Raises OptionError where values are to be compressed, and none of a graph can be.

        Args:
            rounded: how many of a graph are.
        """
        if self.values is not None and not rounded and n_stages > 1:
            raise OptionError(
                f'compress={{"values": "{self.values}"}} has no effect on this model: no value '
                "that crosses stages takes fewer bytes so; leave it out"
            )


WHAT = tuple(Compression.__dataclass_fields__)


def parse_compression(given: Any, name: str = "compress") -> Compression:
    """From "off", a method for gradients, or what is compressed -> method, as a dict or a text.

    Raises:
        OptionError: there is no such method, or not for that.
    """
    if isinstance(given, Compression):
        return given
    if given is None or given == OFF:
        return Compression()
    if isinstance(given, str):
        return parse_compression(parse_text(given), name)
    if not isinstance(given, Mapping):
        raise OptionError(
            f'{name}={given!r}: give a method for gradients, such as "int8", or a dict such as '
            '{"gradients": "powersgd:4", "values": "bf16"}'
        )
    for what in given:
        if what not in WHAT:
            raise OptionError(
                f"{name}={{{what!r}: ...}}: what is compressed is {' or '.join(WHAT)}"
            )
    chosen = {w: _method(f"{name}={{{w!r}: {m!r}}}", w, m) for w, m in given.items()}
    return Compression(**chosen)


def parse_text(text: str) -> dict[str, str]:
    """``int8`` or ``gradients=int8,values=bf16``, as a dict."""
    parts = [part.strip() for part in text.split(",")]
    pairs = [part.partition("=") for part in parts]
    if len(pairs) == 1 and not pairs[0][1]:
        return {"gradients": text.strip()}
    return {what.strip(): method.strip() for what, _, method in pairs}


def _method(where: str, what: str, given: Any) -> Method | None:
    if given is None or given == OFF:
        return None
    fitting = [name for name, kind in KINDS.items() if kind.values or what == "gradients"]
    name, colon, text = str(given).partition(":")
    if name not in fitting:
        known = ", ".join(f'"{each}"' for each in fitting)
        alone = ", which is for gradients alone" if name in KINDS else ""
        raise OptionError(f'{where}{alone}: for {what} use {known}, or "off"')
    kind = KINDS[name]
    if not colon:
        return Method(name, kind.usual)
    if not kind.number:
        raise OptionError(f'{where}: "{name}" takes no number: write "{name}"')
    number = int(text) if text.isdecimal() and len(text) < 9 else 0
    if not kind.least <= number <= kind.most:
        raise OptionError(
            f"{where}: after the colon stands its {kind.number}, from {kind.least} to {kind.most}, "
            f'such as "{name}:{kind.usual}"'
        )
    return Method(name, number)
