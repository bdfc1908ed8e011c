"""Ctrl-C that is not lost in a library.

Python raises `KeyboardInterrupt` wherever it happens to be. In a destructor or in a callback from C++ the exception ends there, and the
work goes on as if nobody had asked.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["insistent"]


@contextmanager
def insistent() -> Iterator[Callable[[], None]]:
    """While active, remember an interrupt; the function that is given raises it again if it is called after one.

    Where somebody handles the signal in a way of their own, or outside the main thread, nothing is changed.
    """
    asked = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.default_int_handler(number, frame)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
