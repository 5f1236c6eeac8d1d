"""What SIGTERM and SIGINT do: to a loop a wish to stop, which it grants some steps later, on all hosts at the same one.

To a program that has nothing to save: its end, even in the middle of a call into a library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
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


def end_on_signals() -> None:
    """From here on SIGTERM and SIGINT end the process with 1 and a line, at once.

    Python's own handlers wait for the compiler to return, and the TPU compiler's print where it was. So a thread waits
    for the number that Python's C handler writes. Outside the main thread, where Python allows no handlers, nothing is
    changed.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        number = os.read(reader, 1)[0]
        sys.stdout.flush()
        print(f"stopped on {signal.Signals(number).name}", file=sys.stderr, flush=True)
        os._exit(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True, name="end on signals").start()
