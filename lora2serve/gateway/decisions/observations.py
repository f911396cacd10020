"""Records of requests and feedback on them, as observations of a trial. Each entry of the store counts once.

Split traffic: each request has one arm, which the route chose by chance. A shadow copy: the champion's answer and the
challenger's to the same request are one pair. Requests that name a version themselves were not divided by chance, and
count for nothing; nor does what the champion answers where the challenger could not. What was refused (400 to 499) is
no answer: of one request nobody knows whose fault it was, but clients' faults hit both arms alike, and a challenger
with less room for prompts refuses more of them. Nor is it one that a client waited for in vain: of a version that
hangs, that is all that is seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from lora2serve.gateway.decisions.trial import Trial
from lora2serve.gateway.request_record import CLIENT_LEFT, TIMEOUT, Feedback, RequestRecord

MOST_REMEMBERED = 1000  # feedback that came before the shadow's answer; requests that the challenger could not answer
PREFERENCES = {"challenger": 1.0, "champion": -1.0, "tie": 0.0}  # labels of feedback that compares two answers
KEYS_AND_QUOTAS = (401, 403, 429)  # why a copy is refused that says nothing of the version

OfRequest = Callable[[str], Sequence[RequestRecord]]
T = TypeVar("T")


class TrialObserver:
    """What one trial takes from entries, in their order. ``of_request`` has the records of a request."""

    def __init__(self, trial: Trial, of_request: OfRequest) -> None:
        self.trial, self._of_request = trial, of_request
        self._early: OrderedDict[str, Feedback] = OrderedDict()
        self._failed: OrderedDict[str, bool] = OrderedDict()

    def take(self, entry: RequestRecord | Feedback) -> None:
        """One entry; those that the trial has had are passed over."""
        if entry.sequence <= self.trial.sequence:
            return
        self.trial.sequence = entry.sequence
        if isinstance(entry, Feedback):
            self._take_feedback(entry)
        elif entry.name == self.trial.name and (entry.error != CLIENT_LEFT or _gave_up(entry)):
            self._take_record(entry)

    def _take_record(self, record: RequestRecord) -> None:
        trial = self.trial
        if record.arm == "shadow":
            records = self._of_request(record.request_id)
            pair = _pair(trial, records)
            if pair and _comparable(*pair):
                champion, challenger = (float(bool(each.error)) for each in pair)
                trial.observe_pair("errors", champion, challenger, unit=_unit(record), at=record.at)
            early = self._early.pop(record.request_id, None)
            if early:
                self._judge(early, records)
            return
        arm = trial.arm(record.version)
        if arm is None or record.arm not in ("champion", "challenger") or trial.mode == "shadow":
            return
        if arm == "champion" and self._failed.pop(record.request_id, False):
            return
        if arm == "challenger" and not record.ok:
            _remember(self._failed, record.request_id, True)
        trial.observe("errors", arm, float(bool(record.error)), unit=_unit(record), at=record.at)
        if not record.error:
            trial.observe("latency", arm, record.seconds, unit=_unit(record), at=record.at)
        if not record.error and record.first_token_seconds is not None:
            trial.observe("first-token", arm, record.first_token_seconds, unit=_unit(record), at=record.at)

    def _take_feedback(self, feedback: Feedback) -> None:
        records = [record for record in self._of_request(feedback.request_id) if record.name == self.trial.name]
        if records and self.trial.mode == "shadow" and not _pair(self.trial, records):
            _remember(self._early, feedback.request_id, feedback)  # the copy is answered after the user
            return
        self._judge(feedback, records)

    def _judge(self, feedback: Feedback, records: Sequence[RequestRecord]) -> None:
        trial, pair = self.trial, _pair(self.trial, records)
        if pair:
            if not _comparable(*pair):
                return
            unit, at = _unit(pair[0]), pair[0].at
            champion, challenger = (feedback.outcome(record) for record in pair)
            if champion is not None and challenger is not None:
                trial.observe_pair("truth", champion, challenger, unit=unit, at=at)
            if feedback.label in PREFERENCES:
                trial.observe_preference(PREFERENCES[feedback.label], unit=unit, at=at)
            return
        divided = sorted(
            (each for each in records if each.arm in ("champion", "challenger")), key=lambda each: each.sequence
        )
        if divided and trial.mode == "split" and divided[0].ok:
            record = divided[0]  # behind it is the champion's, where the challenger could not answer
            arm, outcome = trial.arm(record.version), feedback.outcome(record)
            if arm and outcome is not None:
                trial.observe("truth", arm, outcome, unit=_unit(record), at=record.at)


def _remember(known: OrderedDict[str, T], key: str, value: T) -> None:
    known[key] = value
    if len(known) > MOST_REMEMBERED:
        known.popitem(last=False)


def _pair(trial: Trial, records: Sequence[RequestRecord]) -> tuple[RequestRecord, RequestRecord] | None:
    """The champion's record and the shadow's, of the versions that are tested by copies."""
    if trial.mode != "shadow":
        return None
    champion = next((each for each in records if each.arm == "champion" and each.version == trial.champion), None)
    shadow = next((each for each in records if each.arm == "shadow" and each.version == trial.challenger), None)
    return (champion, shadow) if champion and shadow else None


def _gave_up(record: RequestRecord) -> bool:
    """Whether a client left before any of the answer came; who leaves amid one has seen enough."""
    return record.status == 0 or (record.stream and record.first_token_seconds is None)


def _comparable(champion: RequestRecord, copy: RequestRecord) -> bool:
    """Whether what became of a copy is the version's doing: it waits behind the users', and has its own patience."""
    slow = copy.error == TIMEOUT and champion.seconds > copy.seconds / 2
    return not slow and copy.status not in KEYS_AND_QUOTAS


def _unit(record: RequestRecord) -> tuple[str, str]:
    """Whom a request is from, and which it is."""
    return record.unit, record.request_id
