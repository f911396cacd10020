"""Verdicts on the entries of a store: each counts once, whatever is killed; of several gateways one acts."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path

import pytest

from lora2serve import Registry
from lora2serve.config.schema import build
from lora2serve.gateway.decisions import verdicts
from lora2serve.gateway.decisions.decision_rules import DecisionRecipe, DecisionRule
from lora2serve.gateway.decisions.verdicts import DecisionMaker
from lora2serve.gateway.request_record import Feedback, RequestRecord
from lora2serve.gateway.traffic_store import Entry, TrafficStore
from tests.support.trials import ALIASES, NAME, Heard, maker, moves, plan, request


def batched(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def split(seed: int, requests: int, bad: float = 0.4) -> list[RequestRecord | Feedback]:
    """Requests, and feedback on most of them a little later, twice on some."""
    chance, entries, late = random.Random(seed), [], []
    for number in range(requests):
        version = chance.choice((1, 2))
        arm = ALIASES[version - 1]
        entries.append(request(number, arm, version, seconds=chance.random()))
        if chance.random() < 0.9:
            score = float(chance.random() < (0.9 if version == 1 else bad))
            late += [Feedback(request_id=f"r{number}", at=float(number), score=score)] * chance.choice((1, 1, 2))
        while late and chance.random() < 0.6:
            entries.append(late.pop(0))
    return [*entries, *late]


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bad_challenger_is_rolled_back_once_by_two_gateways(place: Path, step: int) -> None:
    heard = Heard()
    gateways = [maker(place, plan(), heard, states) for states in ("one", "two")]
    writer, acted = TrafficStore(place), []
    for some in batched(split(0, 300), step):
        writer.append(some)
        acted += [verdict for each in gateways for verdict in each.act()]
    assert [(v.outcome, v.champion, v.challenger, v.measure) for v in acted] == [("rollback", 1, 2, "truth")]
    assert moves(place) == [("rollback", "challenger", 1)]
    assert [line.partition(":")[0] for line in heard.lines] == [
        "verdict rollback of medical-qa@2 against medical-qa@1"
    ] * 2
    assert sum("somebody was faster" in line for line in heard.lines) == 1
    assert [each.status()[0].outcome for each in gateways] == ["rollback", verdicts.ELSEWHERE]
    with Registry(place / "registry") as registry:
        assert registry.aliases(NAME) == {"champion": 1, "challenger": 1}
        assert "worse by truth: 0." in registry.history(NAME)[-1].why
        registry.verify()


def test_two_gateways_at_the_same_moment(place: Path) -> None:
    TrafficStore(place).append(())
    gateways = [maker(place, plan(), states=states) for states in ("one", "two", "three")]
    TrafficStore(place).append(split(0, 300))
    barrier, acted = threading.Barrier(3), []

    def act(each: DecisionMaker) -> None:
        barrier.wait()
        acted.extend(each.act())

    threads = [threading.Thread(target=act, args=(each,)) for each in gateways]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(acted) == 1 and moves(place) == [("rollback", "challenger", 1)]


@pytest.mark.parametrize(
    ("seed", "step"), [(0, 3), *(pytest.param(seed, 1, marks=pytest.mark.slow) for seed in (0, 1, 2))]
)
def test_a_restart_neither_forgets_nor_counts_twice(
    place: Path, seed: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that is killed again and again, before and after it writes its state, ends as one that was not."""
    rules = (DecisionRule("truth", promote_within=0.0), DecisionRule("errors"), DecisionRule("latency", quantile=0.5))
    entries, chance, writer = split(seed, 150, bad=0.8), random.Random(seed), TrafficStore(place)
    whole, broken = maker(place, plan(*rules)), maker(place, plan(*rules), states="broken")
    for some in batched(entries, step):
        writer.append(some)
        broken.act()
        if chance.random() < 0.1 * step:
            monkeypatch.setattr(verdicts, "SAVE_EVERY", chance.choice((0.0, 1e9)))
            broken = maker(place, plan(*rules), states="broken")
    whole.act(), broken.act()
    assert broken.status() == whole.status()
    assert whole.status()[0].evidence[0].bets > 30
    broken.close()
    assert maker(place, plan(*rules), states="broken").status() == whole.status()


def test_other_rules_and_other_versions_begin_anew(place: Path) -> None:
    made = maker(place, plan())
    TrafficStore(place).append(split(0, 40, bad=0.9))
    made.act()
    bets = made.status()[0].evidence[0].bets
    assert bets > 0
    made.close()
    assert maker(place, plan()).status()[0].evidence[0].bets == bets
    assert maker(place, plan(DecisionRule("truth", worse_by=0.01))).status()[0].evidence[0].bets == 0
    assert maker(place, plan(challenger=3)).status()[0].evidence[0].bets == 0
    share = [replace(plan()[0], share=0.2)]
    assert maker(place, share).status()[0].evidence[0].bets == bets
    (place / "states" / f"{NAME}@split.json").write_text("{")
    heard = Heard()
    assert maker(place, plan(), heard).status()[0].evidence[0].bets == 0
    assert heard.lines[0].startswith("medical-qa@split: the trial begins anew: ") and "not JSON" in heard.lines[0]


def shadow(number: int, right: tuple[bool, bool], **of_copy: object) -> list[RequestRecord | Feedback]:
    """A request, the answer that is expected of it, and the copy, which may come after the feedback."""
    hashes = ["right" if each else "wrong" for each in right]
    feedback = Feedback(request_id=f"r{number}", at=0.0, expected_hash="right")
    copy = request(number, "shadow", 2, answer_hash=hashes[1], **of_copy)
    first = request(number, "champion", 1, answer_hash=hashes[0])
    return [first, *((feedback, copy) if number % 2 else (copy, feedback))]


def test_shadow(place: Path) -> None:
    """Pairs of one request: the copy that is worse is stopped, the one that is better is promoted."""
    made, writer = maker(place, plan(DecisionRule("truth", promote_within=0.0), mode="shadow")), TrafficStore(place)
    for number in range(30):
        writer.append(shadow(number, (number % 3 > 0, True)))
    acted = made.act()
    assert [(verdict.outcome, verdict.evidence[0].bets) for verdict in acted] == [("promote", 30)]
    with Registry(place / "registry") as registry:
        assert registry.aliases(NAME) == {"champion": 2, "challenger": 2}
        registry.rollback(NAME)
    made = maker(place, plan(DecisionRule("truth"), DecisionRule("errors"), mode="shadow"))
    for number in range(100, 130):
        writer.append(shadow(number, (True, True), error="timeout"))
    assert [(verdict.outcome, verdict.measure) for verdict in made.act()] == [("stop-shadow", "errors")]
    assert moves(place)[-1] == ("stop-shadow", "challenger", 1)


def test_a_challenger_and_a_shadow_at_once(place: Path) -> None:
    """Each has its own trial, on its own part of the traffic."""
    plans = [*plan(DecisionRule("errors")), *plan(DecisionRule("errors"), mode="shadow", challenger=3)]
    made, writer = maker(place, plans), TrafficStore(place)
    for number in range(40):
        writer.append([request(3 * number, "champion", 1), request(3 * number + 1, "challenger", 2)])
        writer.append([replace(request(3 * number, "shadow", 3), error="http" if number > 5 else "")])
    assert {each.mode: each.evidence[0].bets for each in made.status()} == {"split": 0, "shadow": 0}
    made.act()
    assert {each.mode: each.evidence[0].bets for each in made.status()} == {"split": 40, "shadow": 40}
    same = maker(place, plan(DecisionRule("errors")), states="same")  # one version is both
    writer.append([request(500, "champion", 1), request(500, "shadow", 2)])
    same.act()
    assert same.status()[0].evidence[0].bets == 0


def test_what_counts_for_nothing(place: Path) -> None:
    """A client that left, a version that a request named itself, another route, versions that are not tested."""
    made, writer = maker(place, plan(DecisionRule("errors"), DecisionRule("truth"))), TrafficStore(place)
    for number, (arm, version, changes) in enumerate(
        [
            ("champion", 1, {"error": "client_left"}),
            ("named", 2, {}),
            ("champion", 3, {}),
            ("champion", 1, {"name": "x"}),
        ]
        * 5
    ):
        writer.append(
            [replace(request(number, arm, version), **changes), Feedback(request_id=f"r{number}", at=0.0, score=0.0)]
        )
    writer.append([Feedback(request_id="nobody", at=0.0, score=0.0), request(1000, "challenger", 2)])
    made.act()
    assert all(each.bets == 0 for each in made.status()[0].evidence)
    writer.append([request(1001, "champion", 1)])
    made.act()
    assert [each.bets for each in made.status()[0].evidence] == [1, 0]


def test_where_the_challenger_could_not_answer(place: Path) -> None:
    """The champion did: its answer is none of its own part of the traffic, nor feedback on it one on the challenger."""
    rules = (DecisionRule("errors"), DecisionRule("truth"), DecisionRule("latency"))
    made, writer = maker(place, plan(*rules)), TrafficStore(place)
    for number in range(30):
        writer.append([
            request(number, "challenger", 2, error="upstream_gone"), request(number, "champion", 1),
            Feedback(request_id=f"r{number}", at=0.0, score=1.0),
        ])  # fmt: skip
    made.act()
    assert [each.bets for each in made.status()[0].evidence] == [0, 0, 0]
    writer.append([request(100 + number, "champion", 1) for number in range(30)])
    made.act()
    assert [each.bets for each in made.status()[0].evidence][:2] == [30, 0] or made.status()[0].outcome == "rollback"
    assert moves(place) == [("rollback", "challenger", 1)]


def test_what_the_gates_forbid_is_not_promoted(place: Path) -> None:
    """It is said once; the trial goes on, and what turns out to be worse is still rolled back."""
    with Registry(place / "registry") as registry:
        registry.promote(f"{NAME}@3", "challenger", force=True, why="to see")
    heard = Heard()
    made, writer = (
        maker(place, plan(DecisionRule("truth", promote_within=0.0), challenger=3), heard),
        TrafficStore(place),
    )

    def pairs(numbers: range, good: float, bad: float) -> None:
        for number in numbers:
            for version, score in ((1, good), (3, bad)):
                id_number = 2 * number + version // 2
                writer.append([
                    request(id_number, "champion" if version == 1 else "challenger", version),
                    Feedback(request_id=f"r{id_number}", at=0.0, score=score),
                ])  # fmt: skip
            if number % 4 == 0:
                made.act()

    pairs(range(30), 0.0, 1.0)
    assert len(heard.lines) == 1 and "medical-qa@3 cannot become champion: parity" in heard.lines[0]
    pairs(range(100, 301), 1.0, 0.0)
    assert moves(place) == [("rollback", "challenger", 1)]


def test_a_registry_and_a_disk_that_refuse(place: Path) -> None:
    """The verdict waits, and is made when they are there again."""
    heard, plans = Heard(), plan()
    made, writer = maker(place, plans, heard), TrafficStore(place)
    (place / "registry").rename(place / "away")
    (place / "states").write_text("a file")
    writer.append(split(0, 300))
    assert made.act() == made.act() == []
    assert len(heard.lines) == 1 and "no registry" in heard.lines[0]
    (place / "away").rename(place / "registry")
    assert [verdict.outcome for verdict in made.act()] == ["rollback"]
    assert "File exists" in heard.lines[-1] or "Not a directory" in heard.lines[-1]
    (place / "states").unlink()
    made.close()
    assert json.loads((place / "states" / f"{NAME}@split.json").read_text())["outcome"] == "rollback"


def test_a_store_that_cannot_be_read(place: Path) -> None:
    """The trial begins once it can."""
    heard = Heard()
    (place / "traffic.db").write_text("not a database")
    made = maker(place, plan(), heard)
    assert made.status() == made.act() == [] and len(heard.lines) == 1 and "traffic.db" in heard.lines[0]
    (place / "traffic.db").unlink()
    made.plan(plan())
    assert [each.outcome for each in made.status()] == [""]


def listening(bodies: list[object], statuses: list[int]) -> HTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(statuses.pop(0) if statuses else 204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def wait_for(done: Callable[[], bool]) -> None:
    for _ in range(600):
        if done():
            return
        threading.Event().wait(0.05)
    raise AssertionError("not done")


def test_webhook(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict as JSON, again where it was refused; its address, which is a secret, is nowhere in the log."""
    monkeypatch.setattr(verdicts, "PAUSES", (0.0,))
    seconds = count()
    monkeypatch.setattr(verdicts, "_now", lambda: f"2026-11-29T15:55:{next(seconds):02}Z")  # another at each call
    bodies: list[tuple[str, dict[str, object]]] = []
    server = listening(bodies, [500])  # type: ignore[arg-type]
    heard = Heard()
    hook = f"http://127.0.0.1:{server.server_port}/secret?sig=key"
    made = maker(place, plan(webhook=hook), heard)
    TrafficStore(place).append(split(0, 300))
    made.act()
    wait_for(lambda: len(bodies) == 2)
    path, body = bodies[1]
    assert path == "/secret?sig=key" and bodies[0] == bodies[1]
    assert (body["event"], body["outcome"], body["name"], body["champion"], body["challenger"]) == (
        "verdict", "rollback", NAME, 1, 2,
    )  # fmt: skip
    assert body["evidence"][0]["measure"] == "truth"  # type: ignore[index]
    server.shutdown()
    server.server_close()
    with Registry(place / "registry") as registry:
        registry.promote(f"{NAME}@2", "challenger")
    again = maker(place, plan(webhook=hook), heard, "other")
    TrafficStore(place).append([replace(entry, request_id=f"x{entry.request_id}") for entry in split(0, 300)])
    again.act()
    wait_for(lambda: "webhook" in heard.lines[-1])
    assert heard.lines[-1] == "webhook of medical-qa: 127.0.0.1 does not answer"
    assert "secret" not in "".join(heard.lines)


def problems_of(content: object) -> list[str]:
    """Without the path of the section."""
    problems: list[str] = []
    recipe = build(DecisionRecipe, content, problems, path="routes.medical-qa.decisions")
    problems += recipe.problems("routes.medical-qa.decisions")
    return [problem.replace("routes.medical-qa.decisions.", "") for problem in problems]


def test_what_gateway_yaml_may_say() -> None:
    rules = [{"measure": "trut", "worse_bi": 1}, {"measure": "latency", "worse_by": 1.5, "quantile": 2}]
    assert problems_of({"rules": rules, "false_alarms": 0}) == [
        "rules[0].worse_bi: unknown key (did you mean 'rules[0].worse_by'?)",
        "rules[0].measure: 'trut', expected one of truth, wins, errors, latency, first-token (did you mean 'truth'?)",
        "rules[1].quantile: 2.0, expected 0.5 to 0.99",
        "false_alarms: 0.0, expected 0.0001 to 0.5",
    ]
    rules = [{"measure": "errors", "worse_by": 1}, {"measure": "errors"}, {"measure": "latency", "worse_by": 1.5}]
    assert problems_of({"rules": rules, "webhook": "example.com/secret"}) == [
        "rules[0].worse_by: 1, expected less than 1: it is a share of requests",
        "rules[1].measure: 'errors' has a rule already",
        "webhook: expected an address such as https://example.com/hook",
    ]
    assert problems_of({"rules": [{"measure": "truth", "promote_within": 0}], "webhook": "https://a/b?c=d"}) == []
