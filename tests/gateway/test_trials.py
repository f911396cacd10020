"""Challenger and shadow: who gets which version, and that a shadow never hurts whoever asks."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from lora2serve.gateway.request_record import Feedback, RequestRecord, text_hash
from lora2serve.registry.content_store import folder_lock
from tests.support.gateways import CHAT, TestBed, call, chat, metrics, test_bed, total, wait_for
from tests.support.stub_upstream import StubUpstream

pytestmark = pytest.mark.engine
TRIAL = {"champion": 1, "challenger": 2}
SHADOW = {"champion": 1, "shadow": 2}


def test_one_unit_has_one_arm(tmp_path: Path, seed: Path) -> None:
    """The split is as drawn, within four standard deviations, and sticks, also when the gateway starts again."""
    arms: list[dict[str, str]] = []
    for again in range(2):
        folder = tmp_path / str(again)
        folder.mkdir()
        if again:
            (folder / "records").mkdir()
            (folder / "records" / "secret").write_bytes((tmp_path / "0" / "records" / "secret").read_bytes())
        with test_bed(folder, seed, aliases=TRIAL, routes={"towns": {"challenger": {"share": 0.3}}}) as bed:
            with ThreadPoolExecutor(4) as pool:
                units = [f"user-{number}" for number in range(200)]
                got = list(pool.map(lambda unit: chat(bed.url, headers={"x-session-id": unit}), units))
            arms.append({unit: answer.headers["x-lora2serve-arm"] for unit, answer in zip(units, got, strict=True)})
            if not again:
                assert chat(bed.url, user="user-7").headers["x-lora2serve-arm"] == arms[0]["user-7"]
                records = bed.records(201)
                assert len({record.unit for record in records}) == 200 and "user-7" not in str(records)
    assert arms[0] == arms[1]
    challenged = list(arms[0].values()).count("challenger")
    assert abs(challenged - 60) < 4 * (200 * 0.3 * 0.7) ** 0.5


def test_a_conversation_is_a_unit(tmp_path: Path, seed: Path) -> None:
    with test_bed(tmp_path, seed, aliases=TRIAL, routes={"towns": {"challenger": {"share": 0.5}}}) as bed:
        seen = set()
        for number in range(12):
            first = [{"role": "user", "content": f"question {number}"}]
            more = [*first, {"role": "assistant", "content": "x"}, {"role": "user", "content": "and?"}]
            answers = [call(bed.url, body={"model": "towns", "messages": messages}) for messages in (first, more)]
            assert answers[0].version == answers[1].version
            seen.add(answers[0].version)
        assert seen == {"towns@1", "towns@2"}


def digest(bed: TestBed, count: int) -> tuple[str, set[int]]:
    """The bytes of many answers to many questions, and their statuses."""

    def ask(number: int) -> tuple[int, bytes]:
        got = chat(bed.url, f"question {number}", stream=number % 2 == 0, headers={"x-request-id": f"r-{number}"})
        return got.status, got.body

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(count)))
    return hashlib.sha256(b"".join(body for _, body in answers)).hexdigest(), {status for status, _ in answers}


FAULTS = {"none": None, "failing": {"status": 500}, "hung": {"hang": True}, "cut off": {"cut": 1}, "gone": {}}


@pytest.mark.parametrize("fault", [*FAULTS])
@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_shadow_changes_no_byte(tmp_path: Path, seed: Path, fault: str, count: int) -> None:
    bodies = []
    for shadow in (False, True):
        folder = tmp_path / str(shadow)
        folder.mkdir()
        stubs = {"prod": StubUpstream(models=("merged",), takes_adapters=False), "staging": StubUpstream()}
        upstreams = {"prod": {"serves": {"towns@1": "merged"}}, "staging": {}}
        if fault == "gone":
            del stubs["staging"]
            upstreams["staging"] = {"url": "http://127.0.0.1:9", "serves": {"towns@2": "x"}}
        routes = {"towns": {"shadow": {"timeout": 1.0}}}
        aliases = SHADOW if shadow else {"champion": 1}
        with test_bed(folder, seed, stubs=stubs, upstreams=upstreams, aliases=aliases, routes=routes) as bed:
            if shadow and fault != "gone":
                wait_for(partial(stubs["staging"].asked, warm=True), "the shadow is loaded")
                for name, value in (FAULTS[fault] or {}).items():
                    setattr(stubs["staging"].faults, name, value)
            bodies.append(digest(bed, count))
            assert stubs["prod"].asked() == ["merged"] * count
            samples = metrics(bed.url)
            assert total(samples, "lora2serve_requests_total", arm="champion", code="200") == count
            if shadow and fault == "none":
                wait_for(lambda: len(bed.entries()) > count, "records of copies")
                copies = [
                    entry for entry in bed.entries() if isinstance(entry, RequestRecord) and entry.arm == "shadow"
                ]
                assert copies[0].answer_length and copies[0].version == 2 and not copies[0].stream
            if shadow and fault in ("failing", "gone"):
                wait_for(lambda: total(metrics(bed.url), "lora2serve_errors_total", arm="shadow") > 0, "errors counted")
    assert bodies[0] == bodies[1] and bodies[0][1] == {200}


def test_copies_come_after_and_are_bounded(tmp_path: Path, seed: Path) -> None:
    """After the last byte of the answer, so many at once, and the rest is dropped and counted."""
    stubs = {"prod": StubUpstream(models=("merged",), takes_adapters=False), "staging": StubUpstream()}
    upstreams = {"prod": {"serves": {"towns@1": "merged"}}}
    routes = {"towns": {"shadow": {"queue": 3, "parallel": 2}}}
    with test_bed(tmp_path, seed, stubs=stubs, upstreams=upstreams, aliases=SHADOW, routes=routes) as bed:
        wait_for(lambda: stubs["staging"].asked(warm=True), "the shadow is loaded")
        stubs["prod"].faults.gate = threading.Event()
        stubs["staging"].faults.token_seconds = 0.3
        waiting = threading.Thread(target=lambda: chat(bed.url, "a b", stream=True))
        waiting.start()
        wait_for(stubs["prod"].asked, "it is there")
        time.sleep(0.2)
        assert stubs["staging"].asked() == [], "the answer is not complete"
        stubs["prod"].faults.gate.set()
        waiting.join()
        wait_for(stubs["staging"].asked, "the copy")
        stubs["staging"].faults.hang = True
        for _ in range(8):
            chat(bed.url)
        samples = metrics(bed.url)
        assert total(samples, "lora2serve_shadow_dropped_total", adapter="towns", reason="queue") >= 3
        assert len(stubs["staging"].asked()) <= 3


def test_no_copies_while_requests_wait(tmp_path: Path, seed: Path) -> None:
    with test_bed(tmp_path, seed, aliases=SHADOW) as bed:
        bed.stub.faults.waiting = 2
        chat(bed.url)
        dropped = "lora2serve_shadow_dropped_total"
        wait_for(lambda: total(metrics(bed.url), dropped, reason="busy") == 1, "a copy was dropped")
        assert "towns-2" not in bed.stub.asked()


def test_a_copy_goes_to_the_same_address(tmp_path: Path, seed: Path) -> None:
    """With its query: a server that wants one would refuse the copy, and the shadow would look worse than it is."""
    with test_bed(tmp_path, seed, aliases=SHADOW) as bed:
        asked = {"model": "towns", "messages": [{"role": "user", "content": "x"}]}
        assert call(bed.url, f"{CHAT}?api-version=7", asked).status == 200
        wait_for(lambda: "towns-2" in bed.stub.asked(), "the copy")
        sent = zip(bed.stub.asked(warm=True), bed.stub.queries, strict=True)
        assert {name for name, query in sent if query == "api-version=7"} == {"towns-1", "towns-2"}


def test_feedback_is_joined(tmp_path: Path, seed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[tuple[Feedback, tuple[RequestRecord, ...]]] = []

        def on_request(self, record: RequestRecord) -> None:
            raise ValueError("an observer at fault stops nothing")

        def on_feedback(self, feedback: Feedback, records: tuple[RequestRecord, ...]) -> None:
            self.heard.append((feedback, records))

    listener = Listener()
    monkeypatch.setenv("LORA2SERVE_FEEDBACK_KEY", "secret")
    key = {"Authorization": "Bearer secret"}
    with test_bed(tmp_path, seed, aliases=SHADOW, observers=[listener]) as bed:
        got = chat(bed.url, "who", headers={"x-request-id": "id-1"})
        assert got.headers["x-request-id"] == "id-1"
        bed.records(2)
        sent = {"request_id": "id-1", "expected": " towns-1 says who\n"}
        answer = call(bed.url, "/v1/feedback", sent, key)
        assert answer.json == {
            "request_id": "id-1",
            "versions": [{"version": "towns@1", "arm": "champion"}, {"version": "towns@2", "arm": "shadow"}],
        }
        assert call(bed.url, "/v1/feedback", {"request_id": "id-1", "score": 0.2}, key).status == 200
        assert call(bed.url, "/v1/feedback", {"request_id": "unknown", "score": 1}, key).status == 404
        wrong = call(bed.url, "/v1/feedback", {"request_id": 7, "score": 2, "lable": "x"}, key)
        assert wrong.status == 400
        for word in ("'lable': unknown", "request_id: expected", "score: expected a number from 0"):
            assert word in wrong.json["error"]["message"]
        truth = "lora2serve_truth_total"
        samples = metrics(bed.url)
        assert total(samples, truth, version="1", arm="champion", outcome="right") == 1
        assert total(samples, truth, version="1", arm="champion", outcome="wrong") == 1, "the score"
        assert total(samples, truth, version="2", arm="shadow", outcome="wrong") == 1, "it says another name"
        (first, records), _ = listener.heard
        assert first.expected_hash == text_hash("towns-1 says who") == records[0].answer_hash
        assert [entry.sequence for entry in bed.entries()] == [1, 2, 3, 4], "nothing of what was refused"
        assert any("an observer at fault" in warning for warning in bed.told.warnings)
        key["Authorization"] = "Bearer secre"
        assert call(bed.url, "/v1/feedback", sent, key).status == 401
        monkeypatch.delenv("LORA2SERVE_FEEDBACK_KEY")
        assert call(bed.url, "/v1/feedback", sent, key).status == 403


def test_texts_stay_away_unless_asked_for(tmp_path: Path, seed: Path) -> None:
    secret, answer = "4111 1111", "towns-1 says"
    with test_bed(tmp_path, seed) as bed:
        chat(bed.url, f"my card is {secret}", headers={"Authorization": "Bearer sk-client"})
        (record,) = bed.records(1)
        assert (record.prompt, record.answer) == (None, None) and record.prompt_hash == text_hash(
            f"my card is {secret}"
        )
        assert (record.prompt_length, record.finish, record.prompt_tokens) == (20, "stop", 7)
        assert bed.stub.requests[-1][1]["authorization"] == "Bearer sk-client", "keys pass through"
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for word in (secret, answer, "sk-client"):
            assert word.encode() not in content, path
    again = tmp_path / "again"
    again.mkdir()
    capture = {"texts": 1.0, "longest_text": 12, "redact": "tests.gateway.test_trials:without_digits"}
    with test_bed(again, seed, capture=capture) as bed:
        chat(bed.url, secret)
        chat(bed.url, "fail")
        kept = [(record.prompt, record.answer) for record in bed.records(2)]
        assert kept == [("#### ####", "towns-# says"), (None, None)], "bounded; and nothing where the redaction fails"


def without_digits(text: str) -> str:
    assert "fail" not in text
    return "".join("#" if char.isdigit() else char for char in text)


def test_a_locked_registry_and_a_full_disk(tmp_path: Path, seed: Path) -> None:
    """What can flow flows: requests go on, moves are seen again later, records are counted as lost."""
    with test_bed(tmp_path, seed) as bed:
        chat(bed.url)
        with folder_lock(tmp_path / "registry", ".writing", alone=True):
            other = sqlite3.connect(tmp_path / "registry" / "registry.db", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            assert chat(bed.url).status == 200
            other.close()
        (tmp_path / "registry" / "registry.db").rename(tmp_path / "away")
        wait_for(lambda: total(metrics(bed.url), "lora2serve_registry_up") == 0, "it is missed")
        assert chat(bed.url).version == "towns@1"
        (tmp_path / "away").rename(tmp_path / "registry" / "registry.db")
        bed.registry.promote("towns@2")
        bed.becomes(2)
        records = tmp_path / "records"
        bed.records(3)
        for path in records.iterdir():
            if path.name.startswith("traffic.db"):
                path.unlink()
        (records / "traffic.db").mkdir()  # nothing can be written there
        assert chat(bed.url).status == 200
        lost = "lora2serve_records_dropped_total"
        wait_for(lambda: total(metrics(bed.url), lost, reason="disk") > 0, "it is counted")


RULES = {"decisions": {"rules": [{"measure": "errors", "worse_by": 0.0}, {"measure": "truth", "worse_by": 0.0}]}}


@pytest.mark.parametrize("worse", ["errors", "truth", "nothing"])
def test_a_challenger_that_is_worse_is_stopped(
    tmp_path: Path, seed: Path, worse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, within 200 requests; one that is not worse stays. Each answer is of one of the two."""
    monkeypatch.setenv("LORA2SERVE_FEEDBACK_KEY", "secret")
    stubs = {"prod": StubUpstream(models=("merged",), takes_adapters=False), "staging": StubUpstream()}
    upstreams = {"prod": {"serves": {"towns@1": "merged"}}}
    routes = {"towns": {"challenger": {"share": 0.5}, **RULES}}
    verdict = "lora2serve_trial_verdict"
    with test_bed(tmp_path, seed, stubs=stubs, upstreams=upstreams, aliases=TRIAL, routes=routes) as bed:
        wait_for(
            lambda: total(metrics(bed.url), verdict, outcome="none") == 0 and stubs["staging"].adapters, "it begins"
        )
        wait_for(lambda: any(name == verdict for name, _ in metrics(bed.url)), "the trial is there")
        stubs["staging"].faults.status = 500 if worse == "errors" else 0
        stopped = 0
        for number in range(200):
            got = chat(
                bed.url, f"question {number}", headers={"x-session-id": f"u{number}", "x-request-id": f"r{number}"}
            )
            assert got.version in ("towns@1", "towns@2") and got.status == (
                500 if worse == "errors" and got.version == "towns@2" else 200
            )
            if worse != "errors":
                score = 0.0 if worse == "truth" and got.version == "towns@2" else 1.0
                sent = {"request_id": f"r{number}", "score": score}
                assert call(bed.url, "/v1/feedback", sent, {"Authorization": "Bearer secret"}).status == 200
            if number % 20 == 19:
                time.sleep(1.0)  # a look takes half a second
                if bed.registry.aliases("towns")["challenger"] == 1:
                    stopped = number + 1
                    break
        if worse == "nothing":
            assert not stopped and bed.registry.aliases("towns") == TRIAL
            return
        assert stopped, bed.told.notes
        bed.becomes(1, "challenger")
        assert {chat(bed.url, headers={"x-session-id": f"v{number}"}).version for number in range(20)} == {"towns@1"}
        event = bed.registry.history("towns")[-1]
        assert (event.kind, event.alias, event.old, event.new, event.who) == ("rollback", "challenger", 2, 1, "gateway")
        wait_for(lambda: total(metrics(bed.url), verdict, outcome="rollback", mode="split") == 1, "the metrics say so")
