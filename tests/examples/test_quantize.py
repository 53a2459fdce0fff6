"""examples/quantize.py, short: training with the rounding, and inference, are as on one device."""

from __future__ import annotations

import re

import pytest
from support.example import said


@pytest.mark.slow
def test_training_and_inference_are_as_on_one_device() -> None:
    text = said("quantize.py", "--before", "8", "--steps", "3")
    for bits in (8, 4):
        assert f"int{bits} fine-tuning: the bits of one device, 21 tensors" in text
        line = rf"int{bits} inference: the bits of one device; .* off by (\S+) at most"
        (off,) = re.findall(line, text)
        assert float(off) < 1e-5  # the same numbers, multiplied by their scale in another order
    assert "DIFFERS" not in text
    row = r"^(fp32|int\d, \w+ \w+) +\S+ +\S+% +(\S+)"
    sizes = dict(re.findall(row, text, re.MULTILINE))
    small = [float(sizes[name]) for name in ("fp32", "int8, rounded afterwards")]
    smallest = float(sizes["int4, rounded afterwards"])
    assert small[0] > 2 * small[1] > 2 * smallest
    assert "Failed to load" not in text
