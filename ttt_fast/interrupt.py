"""Ctrl-C while weights are changed: held back until they are whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class uninterrupted:
    """Hold Ctrl-C back during the body and raise it at the end: nothing is left half done.

    What may take long runs in ``released()``, where Ctrl-C works at once:

        with uninterrupted() as held, evaluating(model), held.released():
            outputs = model(input_ids)

    A context manager of Python can be interrupted before the first line of its exit. Here that exit
    is the one of ``released()``, which has nothing to give back: all others run while Ctrl-C is
    held. Only the main thread ever receives Ctrl-C, so elsewhere this does nothing.
    """

    def __enter__(self) -> uninterrupted:
        self._received = False
        self._found = None
        if threading.current_thread() is threading.main_thread():
            # None stands for a handler that was not installed from Python: it cannot be put back.
            self._found = signal.getsignal(signal.SIGINT)
        self._hold()
        return self

    def __exit__(self, *exception: object) -> None:
        # A generator that an interrupted exit left behind is closed late: it must not hold again.
        found, self._found = self._found, None
        self._pass_on(found)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let Ctrl-C through during the body."""
        self._pass_on(self._found)
        try:
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        if self._found is not None:
            signal.signal(signal.SIGINT, self._record)

    def _pass_on(self, found: Any) -> None:
        if found is None:
            return
        signal.signal(signal.SIGINT, found)
        if self._received:
            self._received = False
            signal.raise_signal(signal.SIGINT)

    def _record(self, number: int, frame: Any) -> None:
        self._received = True
