"""Where a trial could end well for the wrong reason, or badly for one that is not the version's, or not end at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora2serve.gateway.decisions.decision_rules import DecisionRule
from lora2serve.gateway.request_record import Feedback, RequestRecord
from lora2serve.gateway.traffic_store import FILE, Entry, TrafficStore
from tests.support.trials import ALIASES, Heard, maker, moves, plan, request

ERRORS, LATENCY = DecisionRule("errors", worse_by=0.01), DecisionRule("latency", worse_by=0.2, quantile=0.5)
REFUSED = {"status": 400, "error": "refused"}


def pairs(place: Path, count: int, champion: dict[str, object], copy: dict[str, object]) -> list[str]:
    """The outcomes for so many copies of that kind."""
    made = maker(place, plan(ERRORS, mode="shadow"))
    entries = [
        (request(number, "champion", 1, **champion), request(number, "shadow", 2, **copy)) for number in range(count)
    ]
    TrafficStore(place).append([record for pair in entries for record in pair])
    return [verdict.outcome for verdict in made.act()]


@pytest.mark.parametrize(
    ("champion", "copy", "stopped"),
    [
        ({}, REFUSED, True), ({}, {"error": "in_stream"}, True), ({}, {"status": 404, "error": "refused"}, True),
        ({"seconds": 1.0}, {"seconds": 60.0, "error": "timeout"}, True),
        ({"seconds": 50.0}, {"seconds": 60.0, "error": "timeout"}, False),  # the copy only had less patience
        ({}, {"status": 429, "error": "refused"}, False), ({}, {"status": 401, "error": "refused"}, False),
        ({}, {}, False),
    ],
)  # fmt: skip
def test_copies(place: Path, champion: dict[str, object], copy: dict[str, object], stopped: bool) -> None:
    """What the champion answered and the challenger could not is its failure, unless it is one of keys, quotas, time."""
    assert pairs(place, 60, champion, copy) == (["stop-shadow"] if stopped else [])
    assert bool(moves(place)) == stopped


@pytest.mark.parametrize(("share", "stopped"), [(3, True), (1, False)])
def test_a_challenger_that_refuses_long_prompts(place: Path, share: int, stopped: bool) -> None:
    """One in four requests is refused by both, which is the clients' fault; what only one refuses is its own."""
    made, entries = maker(place, plan(ERRORS, LATENCY)), []
    for number in range(800):
        version = number % 2 + 1
        refused = number // 2 % 4 < (share if version == 2 else 1)
        entries.append(request(number, ALIASES[version - 1], version, seconds=1.0, **(REFUSED if refused else {})))
    TrafficStore(place).append(entries)
    assert [verdict.outcome for verdict in made.act()] == (["rollback"] if stopped else [])


def test_a_challenger_that_fails_in_streams_only(place: Path) -> None:
    made, entries = maker(place, plan(ERRORS)), []
    for number in range(400):
        version, stream = number % 2 + 1, number // 2 % 2 == 0
        error = {"error": "in_stream"} if stream and version == 2 else {}
        entries.append(request(number, ALIASES[version - 1], version, stream=stream, **error))
    TrafficStore(place).append(entries)
    assert [(verdict.outcome, verdict.measure) for verdict in made.act()] == [("rollback", "errors")]


@pytest.mark.parametrize(
    ("champion", "challenger", "stopped"),
    [
        ({}, {"status": 0, "error": "client_left"}, True),
        ({}, {"stream": True, "error": "client_left"}, True),
        ({"status": 0, "error": "client_left"}, {"status": 0, "error": "client_left"}, False),
        ({}, {"stream": True, "first_token_seconds": 0.1, "error": "client_left"}, False),  # has seen enough
    ],
)  # fmt: skip
def test_a_challenger_that_hangs(
    place: Path, champion: dict[str, object], challenger: dict[str, object], stopped: bool
) -> None:
    """Clients do not wait as long as the gateway does: that they left is all that is seen of it."""
    made, entries = maker(place, plan(ERRORS)), []
    for number in range(200):
        changes = challenger if number % 2 else champion
        entries.append(request(number, ALIASES[number % 2], number % 2 + 1, **(changes if number % 3 else {})))
    TrafficStore(place).append(entries)
    assert [verdict.outcome for verdict in made.act()] == (["rollback"] if stopped else [])


def test_refusals_are_not_fast_answers(place: Path) -> None:
    """A challenger that refuses at once what it should answer slowly gets no better times by it."""
    made, entries = maker(place, plan(LATENCY)), []
    for number in range(400):
        version, refused = number % 2 + 1, number // 2 % 4 < 3
        slow = {"seconds": 2.0 if version == 2 else 1.0 + number % 7 / 100}
        quick = {"seconds": 0.001, **REFUSED} if version == 2 else slow
        entries.append(request(number, ALIASES[version - 1], version, **(quick if refused else slow)))
    TrafficStore(place).append(entries)
    assert [(verdict.outcome, verdict.measure) for verdict in made.act()] == [("rollback", "latency")]


@pytest.mark.parametrize("arm", ALIASES)
def test_feedback_for_one_arm_only(place: Path, arm: str) -> None:
    """Nothing is compared, so nothing is decided: neither that one is worse nor that it is good enough."""
    made, entries = maker(place, plan(DecisionRule("truth", worse_by=0.0, promote_within=0.5))), list[Entry]()
    for number in range(300):
        version = number % 2 + 1
        entries.append(request(number, ALIASES[version - 1], version))
        if ALIASES[version - 1] == arm:
            entries.append(Feedback(request_id=f"r{number}", at=0.0, score=float(arm == "challenger")))
    TrafficStore(place).append(entries)
    assert made.act() == [] and made.status()[0].evidence[0].bets == 0


def test_one_request_id_for_all(place: Path) -> None:
    """Such as a session's: each request is one of its own, and feedback is on the last."""
    made, writer, entries = maker(place, plan(ERRORS, DecisionRule("truth"))), TrafficStore(place), list[Entry]()
    for number in range(200):
        version = number % 2 + 1
        error = "upstream_gone" if version == 2 and number % 4 == 1 else ""
        same = replace(request(number, ALIASES[version - 1], version, error=error), request_id="session")
        after = [replace(request(number, "champion", 1), request_id="session")] if error else []
        entries += [same, *after, Feedback(request_id="session", at=0.0, score=float(version == 1 or bool(error)))]
    writer.append(entries)
    by_arm = {record.arm: record.at for record in writer.of_request("session")}
    assert by_arm == {"challenger": 199.0}, "of an id that was used again, the last"
    verdicts = made.act()
    assert [verdict.outcome for verdict in verdicts] == ["rollback"]
    assert {rule.measure: rule.bets for rule in verdicts[0].evidence} == {"errors": 100, "truth": 0}


def test_a_clock_that_was_ahead(place: Path) -> None:
    """For a year it would count no request of the clients that came in the meantime."""
    made, writer = maker(place, plan(ERRORS)), TrafficStore(place)
    year = 365 * 86400.0

    def both(at: float) -> list[RequestRecord]:
        return [replace(request(number, ALIASES[number], number + 1), at=at, unit=f"u{number}") for number in (0, 1)]

    for at, bets in ((1000.0 + year, 1), (1000.0, 2), (1000.0 + 3600, 2), (1000.0 + 90_000, 3)):
        writer.append(both(at))
        made.act()
        assert made.status()[0].evidence[0].bets == bets, at


def test_records_that_were_removed(place: Path) -> None:
    """A new store counts from one again: a trial does not wait until it has as many entries as the old one."""
    heard = Heard()
    made, writer = maker(place, plan(ERRORS), heard), TrafficStore(place)
    for number in range(40):
        writer.append([request(number, ALIASES[number % 2], number % 2 + 1)])
    made.act()
    assert made.status()[0].evidence[0].bets == 20
    made.close()
    writer.close()
    for path in place.glob(f"{FILE}*"):
        path.unlink()
    restarted = maker(place, plan(ERRORS), heard)
    for number in range(100, 110):
        writer.append([request(number, ALIASES[number % 2], number % 2 + 1)])
    for each in (made, restarted):
        each.act()
        assert each.status()[0].evidence[0].bets == 25
    assert heard.lines == []
