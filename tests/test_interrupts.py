"""Signals while a run is in progress: the first is recorded, the second stops."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from engine.driver.interrupts import SIGNALS, deferred_signals


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that must be in place again afterwards."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == dict.fromkeys(
        SIGNALS, signal.default_int_handler
    )
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_recorded_by_its_name(number):
    """The block goes on; before that, nothing is requested."""
    with deferred_signals() as request:
        assert not request and request.signal_name == ""
        os.kill(os.getpid(), number)
        assert request and request.signal_name == number.name


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_stops_at_once(second):
    """Whichever of the two it is; the first one's name is kept."""
    times = iter((5.0, 6.0))
    with pytest.raises(KeyboardInterrupt), deferred_signals(lambda: next(times)) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_name == "SIGTERM"
        os.kill(os.getpid(), second)


def test_a_signal_that_comes_twice_by_two_ways_counts_once():
    """To the process and to its group, or by a wrapper: SIGTERM within a second. A person's second SIGINT counts."""
    times = iter((5.0, 5.1, 5.9))
    with deferred_signals(lambda: next(times)) as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_name == "SIGTERM"
    for pair in ((signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)):
        with pytest.raises(KeyboardInterrupt), deferred_signals(lambda: 5.0):
            for number in pair:
                os.kill(os.getpid(), number)


def test_other_threads_leave_the_handlers_alone():
    """Only the main thread may set handlers; elsewhere the block runs without them."""
    seen = []

    def work() -> None:
        with deferred_signals() as request:
            seen.append((bool(request), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.default_int_handler)]
