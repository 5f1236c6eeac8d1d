"""SIGTERM and SIGINT become a wish to stop, which the loop grants a few steps later, on all hosts at the same one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """What has been asked for: ``number`` is the signal's number, or 0 for nothing."""

    number = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT inside the block; a second SIGINT ends the process the usual way.

    A second SIGTERM does not: schedulers send one more while the run is still saving on the first.
    Outside the main thread, where Python allows no handlers, nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: object) -> None:
        request.number = number
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, previous[number])
