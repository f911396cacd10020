"""Times in questions: ``--since 2026-07-01``, ``--last quarter``; all of UTC's calendar."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

from lora2serve.errors import UsageError, did_you_mean
from lora2serve.registry.version_facts import utc

DAYS = re.compile(r"(\d{1,5})(?:d|days?)")
LAST = ("day", "week", "month", "quarter", "year")


def time_of(text: str, option: str) -> str:
    """``2026-07-01`` or ``2026-07-01T12:00``, as registries have it; UsageError for anything else."""
    try:
        moment = datetime.fromisoformat(text)
        return utc(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):  # the first and the last day have no UTC in some time zones
        raise UsageError(f"{option} {text}: expected a date", "such as 2026-07-01, or 2026-07-01T12:00Z") from None


def period(since: str, until: str, last: str) -> tuple[str, str]:
    """First moment, and the first one after it, of what was asked for; empty where nothing was."""
    if not last:
        return time_of(since, "--since") if since else "", time_of(until, "--until") if until else ""
    if since or until:
        raise UsageError("--last with --since or --until: one says it all")
    return last_period(last)


def last_period(text: str, today: date | None = None) -> tuple[str, str]:
    """First moment, and the first one after it: of the calendar quarter before this one, or of the last 30 days."""
    today = today or datetime.now(UTC).date()
    if match := DAYS.fullmatch(text):
        try:
            return _moments(today - timedelta(days=int(match[1])), today + timedelta(days=1))
        except OverflowError:
            raise UsageError(f"--last {text}: longer ago than there are dates") from None
    if text not in LAST:
        raise UsageError(
            f"--last {text}: unknown{did_you_mean(text, LAST)}",
            f"expected {', '.join(LAST)}, or a number of days such as 30d",
        )
    if text == "day":
        return _moments(today - timedelta(days=1), today)
    if text == "week":
        monday = today - timedelta(days=today.weekday())
        return _moments(monday - timedelta(days=7), monday)
    if text == "year":
        return _moments(date(today.year - 1, 1, 1), date(today.year, 1, 1))
    months = 3 if text == "quarter" else 1
    first = (today.year * 12 + today.month - 1) // months * months  # of this period, in months of all years
    return _moments(_month(first - months), _month(first))


def _month(number: int) -> date:
    return date(number // 12, number % 12 + 1, 1)


def _moments(first: date, after: date) -> tuple[str, str]:
    return f"{first.isoformat()}T00:00:00Z", f"{after.isoformat()}T00:00:00Z"
