"""Records of requests and feedback on them, as observations of a trial. Each entry of the store counts once.

Split traffic: each request has one arm, which the route chose by chance. A shadow copy: the champion's answer and the
challenger's to the same request are one pair. Requests that name a version themselves were not divided by chance, and
count for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from lora2serve.gateway.decisions.trial import Trial
from lora2serve.gateway.request_record import Feedback, RequestRecord

MOST_EARLY = 1000  # feedback that came before the shadow's answer
PREFERENCES = {"challenger": 1.0, "champion": -1.0, "tie": 0.0}  # labels of feedback that compares two answers

OfRequest = Callable[[str], Sequence[RequestRecord]]


class TrialObserver:
    """What one trial takes from entries, in their order. ``of_request`` has the records of a request."""

    def __init__(self, trial: Trial, of_request: OfRequest) -> None:
        self.trial, self._of_request = trial, of_request
        self._early: OrderedDict[str, Feedback] = OrderedDict()

    def take(self, entry: RequestRecord | Feedback) -> None:
        """One entry; those that the trial has had are passed over."""
        if entry.sequence <= self.trial.sequence:
            return
        self.trial.sequence = entry.sequence
        if isinstance(entry, Feedback):
            self._take_feedback(entry)
        elif entry.name == self.trial.name and entry.error != "client_left":
            self._take_record(entry)

    def _take_record(self, record: RequestRecord) -> None:
        trial = self.trial
        if record.arm == "shadow":
            records = self._of_request(record.request_id)
            pair = _pair(trial, records)
            if pair:
                champion, challenger = (float(not each.ok) for each in pair)
                trial.observe_pair("errors", champion, challenger, unit=_unit(record), at=record.at)
            early = self._early.pop(record.request_id, None)
            if early:
                self._judge(early, records)
            return
        arm = trial.arm(record.version)
        if arm is None or record.arm not in ("champion", "challenger") or trial.mode == "shadow":
            return
        trial.observe("errors", arm, float(not record.ok), unit=_unit(record), at=record.at)
        if record.ok:
            trial.observe("latency", arm, record.seconds, unit=_unit(record), at=record.at)
        if record.ok and record.first_token_seconds is not None:
            trial.observe("first-token", arm, record.first_token_seconds, unit=_unit(record), at=record.at)

    def _take_feedback(self, feedback: Feedback) -> None:
        records = [record for record in self._of_request(feedback.request_id) if record.name == self.trial.name]
        if records and self.trial.mode == "shadow" and not _pair(self.trial, records):
            self._early[feedback.request_id] = feedback  # the copy is answered after the user
            if len(self._early) > MOST_EARLY:
                self._early.popitem(last=False)
            return
        self._judge(feedback, records)

    def _judge(self, feedback: Feedback, records: Sequence[RequestRecord]) -> None:
        trial, pair = self.trial, _pair(self.trial, records)
        if pair:
            unit, at = _unit(pair[0]), pair[0].at
            champion, challenger = (feedback.outcome(record) for record in pair)
            if champion is not None and challenger is not None:
                trial.observe_pair("truth", champion, challenger, unit=unit, at=at)
            if feedback.label in PREFERENCES:
                trial.observe_preference(PREFERENCES[feedback.label], unit=unit, at=at)
            return
        for record in records:
            arm, outcome = trial.arm(record.version), feedback.outcome(record)
            if arm and outcome is not None and record.arm in ("champion", "challenger") and trial.mode == "split":
                trial.observe("truth", arm, outcome, unit=_unit(record), at=record.at)


def _pair(trial: Trial, records: Sequence[RequestRecord]) -> tuple[RequestRecord, RequestRecord] | None:
    """The champion's record and the shadow's, of the versions that are tested."""
    champion = next((each for each in records if each.arm == "champion" and each.version == trial.champion), None)
    shadow = next((each for each in records if each.arm == "shadow" and each.version == trial.challenger), None)
    return (champion, shadow) if champion and shadow else None


def _unit(record: RequestRecord) -> tuple[str, str]:
    """Whom a request is from, and which it is."""
    return record.unit, record.request_id
