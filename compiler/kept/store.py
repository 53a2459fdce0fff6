"""The graphs of one model on disk: when one is looked for, and when one may be kept.

A graph is kept where the hash of all that it depends on is the same before and after it was traced,
but for plain attributes that forward has set, which are kept with it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.batch import BatchSpec
from ..capture.capture import Captured
from ..capture.skeleton import Skeleton
from ..effects.files import opened
from .attributes import Change, changes_of, make, plain_attributes, unmake
from .folder import Entry, Folder, Heard
from .identity import UntoldError, identity_of
from .surroundings import settings, versions

Record = tuple[Any, ...]


@dataclass
class _Start:
    """Where the model was when a graph began to be traced, and what has happened since.

    Attributes:
        updated: frozen parameters that forward updates, as far as was known.
    """

    identity: str
    updated: list[str]
    heard: list[Heard] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


class Store:
    """Args:
    folder: None where nothing is kept.
    loss_fn: where that is no module of the skeleton's.
    told: what graphs depend on besides; equal texts for equal values.
    device: where they are traced.

    Attributes:
        why: why nothing is kept; "" while it is.
    """

    def __init__(
        self,
        folder: Folder | None,
        skeleton: Skeleton,
        loss_fn: Callable[..., Any] | None,
        told: object,
        device: torch.device,
    ):
        self._folder, self._skeleton = folder, skeleton
        self._reached = (skeleton.module, loss_fn)
        self._told, self._device = told, device
        self._identity = ""
        self._start: _Start | None = None
        self._once: dict[Any, Any] = {}
        self.why = "" if folder else "PIPECOMPILE_CACHE=off"

    def find(self, use: object, spec: BatchSpec, batch: Sequence[torch.Tensor]) -> Entry | None:
        """A graph that was kept; its warnings are given again, and what its forward has set is set.

        Args:
            use: what it is for.
            batch: leaves of a microbatch, which forward may ask.
        """
        self._check()
        key = self._key(self._now, use, spec)
        if self._folder is None or not key:
            return None
        entry = self._folder.find(key, batch, self._skeleton.mode)
        if entry is None:
            return None
        guards, known = entry.captured.guards, self._skeleton.values_of_buffers()
        for name in guards.buffers:
            kept = guards.constants[name]
            if name not in known or not torch.equal(known[name].to(kept), kept):
                return None
        self._skeleton.met(entry.captured.graph, entry.captured.lost, guards)
        if entry.changes:
            make(self._skeleton.module, entry.changes)
            self._identity = self._identify()
        for each in entry.heard:
            each.repeat(self._once)
        return entry

    @contextmanager
    def noting(self, looked: bool = False) -> Iterator[None]:
        """A trace inside.

        Args:
            looked: right after a look for it, and nothing has been done in between.
        """
        if not looked:
            self._check()
        start = self._start = self._start or self._now
        before = plain_attributes(self._skeleton.module)
        with warnings.catch_warnings(record=True) as heard, opened() as files:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                start.heard += [
                    Heard(each.category, str(each.message), each.filename, each.lineno)
                    for each in heard
                ]
        for each in start.heard:
            each.repeat(self._once)
        if files:
            self.why = self.why or f"forward opens {files[0]}"
        changes = changes_of(before, plain_attributes(self._skeleton.module))
        start.changes += changes
        unmake(self._skeleton.module, changes)
        self._check()
        make(self._skeleton.module, changes)
        if changes:
            self._identity = self._identify()

    def add(
        self, use: object, spec: BatchSpec, captured: Captured, records: Sequence[Record]
    ) -> str:
        """Keep a graph that was traced last, or that follows from one; why it is not kept, or
        ""."""
        start, self._start = self._start or self._now, None
        key = self._key(start, use, spec)
        if self._folder is None or not key:
            return self.why
        if self._skeleton.regions.patterns:
            return "parts of the model run eagerly"
        entry = Entry(captured, tuple(records), tuple(start.heard), tuple(start.changes))
        try:
            self._folder.add(key, entry)
        except UntoldError as error:
            return str(error)
        return ""

    @property
    def _now(self) -> _Start:
        return _Start(self._identity, sorted(self._skeleton.updated))

    def _check(self) -> None:
        """Whether all that graphs depend on is still as it was."""
        found = self._identify()
        if self._identity and found and found != self._identity:
            self.why = "forward changes what the next one depends on, or imports it"
        self._identity = found

    def _identify(self) -> str:
        """The hash of it; "" where nothing is kept."""
        if self.why:
            return ""
        try:
            return repr((identity_of(*self._reached), settings(self._device)))
        except UntoldError as error:
            self.why = f"it depends on {error}"
            return ""

    def _key(self, start: _Start, use: object, spec: BatchSpec) -> str:
        if self.why:
            return ""
        try:
            constants = identity_of(*(value for _, value in spec.constants))
        except UntoldError as error:
            self.why = f"the batch has {error}"
            return ""
        shape = str(spec.tree), spec.leaves, constants, spec.left_out, spec.scales
        told = (*versions(), start.identity, start.updated, self._told, use, shape)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:40]
