"""Records of requests: what is written is read, in order, within bounds, by several gateways."""

from __future__ import annotations

import json
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora2serve.errors import InputError
from lora2serve.gateway.request_record import Feedback, RequestRecord, from_text, text_hash, to_text, unit_hash
from lora2serve.gateway.traffic_store import TrafficStore


def record(number: int = 0, **changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "request_id": f"r{number}", "at": 1000.0 + number, "name": "towns", "version": 1, "arm": "champion",
        "upstream": "prod", "unit": "u", "path": "/v1/completions", "status": 200,
    }  # fmt: skip
    return RequestRecord(**{**values, **changes})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = TrafficStore(tmp_path / "new" / "folder")
    assert list(store.entries()) == [] and store.of_request("r1") == (), "nothing there yet"
    first = record(1, answer="a\ud800\x00b", features={"length": 2.0}, prompt_tokens=0, first_token_seconds=0.25)
    truth = Feedback(request_id="r1", at=2000.0, score=0.0)
    shadow = record(1, arm="shadow", version=2)
    written = store.append([first, shadow]) + store.append([truth, record(2, name="other")])
    assert [entry.sequence for entry in written] == [1, 2, 3, 4]
    assert list(store.entries()) == written and list(store.entries(after=2)) == written[2:]
    assert store.of_request("r1") == tuple(written[:2])
    assert list(store.requests("towns", since=1001.0)) == written[:2]
    assert list(store.requests("towns", until=1001.0)) == []
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    store.close()
    assert list(TrafficStore(tmp_path / "new" / "folder").entries()) == written


def test_a_later_version_may_add_keys() -> None:
    content = {**json.loads(to_text(record(answer_hash="x"))), "color": "red"}
    assert from_text(RequestRecord, json.dumps(content), 7) == record(answer_hash="x", sequence=7)


def test_the_oldest_go(tmp_path: Path) -> None:
    store = TrafficStore(tmp_path, most_bytes=1 << 20)
    for start in range(0, 6000, 500):
        store.append([record(number, prompt="x" * 400) for number in range(start, start + 500)])
    left = [entry.sequence for entry in store.entries()]
    assert left == list(range(left[0], 6001)) and 1000 <= len(left) < 4000
    assert store.path.stat().st_size < 3 << 20


def test_several_gateways(tmp_path: Path) -> None:
    def work(gateway: int) -> None:
        store = TrafficStore(tmp_path)
        for number in range(20):
            store.append([record(number, request_id=f"{gateway}-{number}")])
        store.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    entries = list(TrafficStore(tmp_path).entries())
    assert [entry.sequence for entry in entries] == list(range(1, 81))
    assert len({entry.request_id for entry in entries}) == 80


def test_a_new_file_that_many_open_at_once(tmp_path: Path) -> None:
    """Nothing is lost of the first records: sqlite said "locked" at once, now and then."""
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(40):
            stores, together = [TrafficStore(tmp_path / str(attempt)) for _ in range(8)], threading.Barrier(8)

            def first(store: TrafficStore, together: threading.Barrier = together) -> None:
                together.wait()
                store.append([record(1)])
                store.close()

            list(pool.map(first, stores))
            assert len(list(stores[0].entries())) == 8


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    """All of a batch or nothing, and the next one goes on."""
    store = TrafficStore(tmp_path)
    store.append([record(1)])
    with pytest.raises(sqlite3.Error):
        store.append([record(2), record(3, at="no number", request_id=None)])
    assert [entry.request_id for entry in store.append([record(4)])] == ["r4"]
    assert [entry.request_id for entry in store.entries()] == ["r1", "r4"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "traffic.db").write_text("not a database, but long enough to look like one")
    with pytest.raises(InputError, match=r"traffic\.db"):
        list(TrafficStore(tmp_path / "other").entries())


def test_outcomes() -> None:
    right = record(answer_hash=text_hash(" Leon Lake\n"))
    expected = Feedback(request_id="r0", at=1.0, expected_hash=text_hash("Leon Lake"))
    assert expected.outcome(right) == 1.0 and expected.outcome(record(arm="shadow", answer_hash="x")) == 0.0
    score = Feedback(request_id="r0", at=1.0, score=0.5)
    assert score.outcome(right) == 0.5
    assert score.outcome(record(arm="shadow")) is None, "the client has not seen that answer"
    assert Feedback(request_id="r0", at=1.0, label="good").outcome(right) is None


def test_units_are_not_readable() -> None:
    assert unit_hash(b"secret", "towns", "ann") == unit_hash(b"secret", "towns", "ann")
    others = {unit_hash(b"other", "towns", "ann"), unit_hash(b"secret", "b", "ann"), unit_hash(b"secret", "towns", "b")}
    assert len(others) == 3 and unit_hash(b"secret", "towns", "ann") not in others
