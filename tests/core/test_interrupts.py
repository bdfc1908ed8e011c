"""An interrupt that a library swallows is raised again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tmc_export.core.interrupts import insistent


@pytest.fixture(autouse=True)
def python_s_own_handler() -> Iterator[None]:
    """As in a terminal: a process that a shell starts in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Swallows:
    """Python prints what is raised in a destructor, and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two instructions
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_destructor_swallows() -> None:
    with insistent() as check:
        check()
        made = Swallows()
        del made  # nothing is raised here
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_raised_at_once_where_nothing_swallows_it() -> None:
    with pytest.raises(KeyboardInterrupt), insistent():
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")


def test_another_handler_stays() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with insistent() as check:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
