"""Whether this process is the command line's own, or a program or notebook that imported us.

Only in a process of our own is anything done that the rest of a process would notice.
"""

from __future__ import annotations

from threading import Event

_claimed = Event()


def claim() -> None:
    """The command line says so, before anything else."""
    _claimed.set()


def is_ours() -> bool:
    """Whether it has."""
    return _claimed.is_set()
