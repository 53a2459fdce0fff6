"""Runs that go on when processes are lost or come back."""

from .runtime.elastic.session import Resumed as Resumed
from .runtime.elastic.session import Session as Session
