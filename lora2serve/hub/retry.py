"""Trying again what may get through, and only that.

huggingface_hub retries uploads and listings by itself, but not the making of a repository, branch or commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lora2serve.progress import Progress

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries
LONGEST_WAIT = 300.0  # seconds that a Retry-After may ask for
AGAIN = (408, 425, 429, 500, 502, 503, 504)


def with_retries(act: Callable[[], T], progress: Progress, what: str, *, reached: bool = True) -> T:
    """Run ``act``, which must be safe to repeat, until it gets through or fails for good.

    ``reached`` says that the Hub answered before: else a connection that is refused is no network, an error at once.
    """
    for wait in WAITS:
        try:
            return act()
        except Exception as error:
            pause = _pause(error, wait) if reached or not _no_network(error) else None
            if pause is None:
                raise
            progress.note(f"{what}: {_brief(error)}; trying again in {pause:.0f} s")
            time.sleep(pause)
    return act()


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of huggingface_hub carries, itself or as its cause."""
    for cause in causes(error):
        response: Any = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def broken_line(error: BaseException) -> bool:
    """Whether the connection failed, rather than the Hub refused."""
    import httpx2

    kinds = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    return any(isinstance(cause, kinds) for cause in causes(error))


def _no_network(error: BaseException) -> bool:
    import httpx2

    return any(isinstance(cause, httpx2.ConnectError) for cause in causes(error))


def _pause(error: BaseException, wait: float) -> float | None:
    """Seconds to wait before the next try, or None where another try is of no use."""
    status = status_of(error)
    if status is None:
        # The card's check parses the answer before it looks at the status: a 503 in HTML ends as "no JSON" there.
        return wait if broken_line(error) or "JSON" in type(error).__name__ else None
    if status not in AGAIN and not _completed_before(error):
        return None
    return max(wait, _retry_after(error))


def _completed_before(error: BaseException) -> bool:
    """Storage has joined the parts of an upload, and only its answer was lost: asked again, it knows no such upload."""
    return any("NoSuchUpload" in str(cause) for cause in causes(error))


def _retry_after(error: BaseException) -> float:
    for cause in causes(error):
        response: Any = getattr(cause, "response", None)
        if response is not None:
            seconds = response.headers.get("Retry-After", "")
            return min(float(seconds), LONGEST_WAIT) if seconds.isdigit() else 0.0
    return 0.0


def _brief(error: BaseException) -> str:
    status = status_of(error)
    return "the connection broke" if status is None else f"the Hub answers {status}"
