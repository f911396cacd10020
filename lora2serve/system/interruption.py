"""Whatever asks this program to end is Ctrl-C: what is under way is broken off, and what it has begun is removed.

SIGTERM comes from a scheduler, a container or ``timeout``; SIGHUP from a terminal that is closed. A signal that the
caller has us ignore (``nohup``, a shell's job in the background) is ignored.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], object] | signal.Handlers
PAIR = 2.0  # seconds: a terminal that closes and its shell send one each, and the second must not stop the tidying


def end_like_ctrl_c() -> None:
    """From here on each of ``ENDINGS`` raises KeyboardInterrupt in the main thread. For a process of our own."""
    handle(_interrupting())


def handle(handler: Handler) -> dict[signal.Signals, Handler | int | None]:
    """Set one handler for those of ``ENDINGS`` that are not ignored; what each had before."""
    numbers = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def ignore() -> None:
    """What is left to do must be done whatever comes."""
    handle(signal.SIG_IGN)


def _interrupting() -> Callable[[int, FrameType | None], None]:
    last = -PAIR

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        since, last = time.monotonic() - last, time.monotonic()
        if since > PAIR:
            raise KeyboardInterrupt

    return interrupt
