"""What the trials found, as tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .families import FAMILIES
from .trial import CLOSE, DIFFERENT, FAILED, NO_EAGER, OUTCOMES, REFUSED, RIGHT, TIMEOUT, Outcome

_TITLES = {
    DIFFERENT: "Silently different",
    CLOSE: "Different by rounding",
    FAILED: "Failed",
    TIMEOUT: "Not finished in time",
    REFUSED: "Refused",
    NO_EAGER: "Nothing to compare with",
}


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many of each family came to what, as a Markdown table."""
    heads = ("family", *OUTCOMES, "right of those that run in eager")
    rows = [heads, ("---",) * len(heads)]
    for family in (*FAMILIES, None):
        found = [each.outcome for each in outcomes if family in (each.family, None)]
        if not found:
            continue
        counts = Counter(found)
        eager = len(found) - counts[NO_EAGER]
        share = f"{counts[RIGHT]} of {eager}"
        share += f", {counts[RIGHT] / eager:.1%}" if eager else ""
        rows.append((family or "all", *(str(counts[each]) for each in OUTCOMES), share))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def markdown(outcomes: Sequence[Outcome], stages: int) -> str:
    """The document: the summary, everything that is not right with its reason, and what is."""
    parts = [_HEAD.format(stages=stages), summary(outcomes)]
    for outcome, title in _TITLES.items():
        found = [each for each in outcomes if each.outcome == outcome]
        if found:
            parts.append(f"\n## {title}\n\n")
            parts += [f"- `{each.architecture}`: {_reason(each)}\n" for each in found]
    parts.append("\n## Right\n")
    for family in FAMILIES:
        names = [each.name for each in outcomes if (each.family, each.outcome) == (family, RIGHT)]
        if names:
            parts.append(f"\n{family}: {', '.join(names)}\n")
    return "".join(parts)


def _reason(outcome: Outcome) -> str:
    """Without where this machine has its packages."""
    reason = re.sub(r"/\S*/site-packages/", "", outcome.reason)
    if outcome.difference is None:
        return reason
    return f"{reason}; by at most {outcome.difference:.1e}"


_HEAD = """# Coverage

Which architectures train under stages as they do plainly. `pipecompile zoo` builds a tiny model of
every architecture of the installed transformers, in five families, and of some that are written
with `torch.nn` alone. Each trains in {stages} stages on two microbatches for two clipped steps and
is evaluated, without dropout, and plainly in one process. *Right* means that losses, gradients,
global norms, parameters, buffers and the loss of the evaluation have the same bits. *Refused* is a
clear error instead of numbers. What cannot be built without other packages, or does not train
plainly, has *no eager* run to compare with, and does not count.

"""
