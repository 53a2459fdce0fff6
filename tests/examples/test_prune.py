"""examples/prune.py, short: masks hold, and all is as on one device."""

from __future__ import annotations

import re

import pytest
from support.example import said


@pytest.mark.slow
def test_masks_hold_and_all_is_as_on_one_device() -> None:
    text = said("prune.py", "--steps", "8", "--every", "2", "--sparsity", "0.75")
    found = [float(n) for n in re.findall(r"sparsity (\d\.\d+)", text)]
    assert found == sorted(found)
    assert found[0] < found[-1] == 0.75
    assert "weights and masks: the bits of one device, 35 tensors" in text
    assert "fewer heads: the bits of one device, 21 tensors" in text
    assert re.search(r"exported: 147,456 zeros, equal loss: True", text)
    assert "DIFFERS" not in text
