"""The graphs of one model on disk: when one is looked for, and when one may be kept.

A graph is kept where the hash of all that it depends on is the same before and after it was traced.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..capture.batch import BatchSpec
from ..capture.capture import Captured
from ..capture.skeleton import Skeleton
from ..effects.files import opened
from .folder import Entry, Folder, Heard
from .identity import UntoldError, identity_of
from .surroundings import settings, versions

Record = tuple[Any, ...]


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
        self._heard: list[Heard] = []
        self._before: list[str] | None = None
        self._once: dict[Any, Any] = {}
        self.why = "" if folder else "PIPECOMPILE_CACHE=off"

    def find(self, use: object, spec: BatchSpec, batch: Sequence[torch.Tensor]) -> Entry | None:
        """A graph that was kept; its warnings are given again.

        Args:
            use: what it is for.
            batch: leaves of a microbatch, which forward may ask.
        """
        self._identify()
        key = self._key(use, spec)
        if self._folder is None or not key:
            return None
        entry = self._folder.find(key, batch, self._skeleton.mode)
        if entry is None:
            return None
        captured = entry.captured
        known = self._skeleton.values_of_buffers()
        for name in captured.guards.buffers:
            kept = captured.guards.constants[name]
            if name not in known or not torch.equal(known[name].to(kept.device), kept):
                return None
        self._skeleton.met(captured.graph, captured.lost, captured.guards)
        for each in entry.heard:
            each.repeat(self._once)
        return entry

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A trace inside."""
        self._identify()
        self._heard, self._before = [], sorted(self._skeleton.updated)
        with warnings.catch_warnings(record=True) as heard, opened() as files:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                self._heard = [
                    Heard(each.category, str(each.message), each.filename, each.lineno)
                    for each in heard
                ]
        for each in self._heard:
            each.repeat(self._once)
        if files:
            self.why = self.why or f"forward opens {files[0]}"
        self._identify()

    def add(
        self, use: object, spec: BatchSpec, captured: Captured, records: Sequence[Record]
    ) -> str:
        """Keep a graph that was traced last, or that follows from one; why it is not kept, or
        ""."""
        entry = Entry(captured, tuple(records), tuple(self._heard))
        key = self._key(use, spec)
        self._heard, self._before = [], None
        if self._folder is None or not key:
            return self.why
        if self._skeleton.regions.patterns:
            return "parts of the model run eagerly"
        try:
            self._folder.add(key, entry)
        except UntoldError as error:
            return str(error)
        return ""

    def _identify(self) -> None:
        """Whether all that graphs depend on is still as it was."""
        if self.why or self._folder is None:
            return
        try:
            found = repr((identity_of(*self._reached), settings(self._device)))
        except UntoldError as error:
            self.why = f"it depends on {error}"
            return
        if self._identity and found != self._identity:
            self.why = "a forward changes what the next one depends on, or imports it"
        self._identity = found

    def _key(self, use: object, spec: BatchSpec) -> str:
        if self.why:
            return ""
        try:
            constants = identity_of(*(value for _, value in spec.constants))
        except UntoldError as error:
            self.why = f"the batch has {error}"
            return ""
        shape = str(spec.tree), spec.leaves, constants, spec.left_out, spec.scales
        before = self._before
        updated = sorted(self._skeleton.updated) if before is None else before
        told = (*versions(), self._identity, self._told, use, shape, updated)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:40]
