"""`lora2serve top` on metrics that prometheus-client writes, and the figures of two scrapes."""

from __future__ import annotations

import math
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import lora2serve
from lora2serve.cli import run as command_line
from lora2serve.gateway.monitoring.live_table import table_view
from lora2serve.gateway.monitoring.metric_samples import parse_scrape, quantile_of

ROOT = Path(lora2serve.__file__).parents[1]
ARM = ("adapter", "version", "arm")
A = ("qa", "2", "champion")


class Served:
    """The metrics of a gateway, which the test moves, at an address."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lora2serve_requests", "x", [*ARM, "upstream", "code"], registry=self.registry)
        self.errors = Counter("lora2serve_errors", "x", [*ARM, "kind"], registry=self.registry)
        self.first = Histogram("lora2serve_first_token_seconds", "x", ARM, registry=self.registry, buckets=(0.1, 1, 10))
        self.tokens = Counter("lora2serve_tokens", "x", [*ARM, "kind"], registry=self.registry)
        self.truth = Counter("lora2serve_truth", "x", [*ARM, "outcome"], registry=self.registry)
        self.size = Gauge("lora2serve_adapter_bytes", "x", ["adapter", "version", "where"], registry=self.registry)
        trial = ["adapter", "mode", "champion", "challenger"]
        self.evidence = Gauge("lora2serve_trial_evidence", "x", [*trial, "measure"], registry=self.registry)
        self.verdict = Gauge("lora2serve_trial_verdict", "x", [*trial, "outcome"], registry=self.registry)
        self.drifted = Gauge("lora2serve_drifted", "x", ["adapter", "version", "feature"], registry=self.registry)
        Gauge("lora2serve_registry_up", "x", registry=self.registry).set(1)
        self.ask(8, 0.05)
        self.size.labels("qa", "2", "slot").set(5_000_000)

    def ask(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.requests.labels(*A, "prod", "200").inc()
            self.first.labels(*A).observe(seconds)
            self.tokens.labels(*A, "completion").inc(10)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


@pytest.fixture
def served() -> Iterator[tuple[Served, str]]:
    made = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = made.text().encode() if self.path == "/metrics" else b"other_metric 1\n"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield made, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_once(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    made, url = served
    made.errors.labels(*A, "timeout").inc(2)
    made.errors.labels(*A, "client_left").inc(4)  # no failure
    made.truth.labels(*A, "right").inc(3)
    made.truth.labels(*A, "wrong").inc(1)
    made.evidence.labels("qa", "split", "2", "3", "all").set(0.4)
    made.verdict.labels("qa", "split", "2", "3", "none").set(0)
    made.drifted.labels("qa", "2", "answer.length").set(1)
    assert command_line(["top", "--url", url, "--once"]) == 0
    head, row, trial, drift = capsys.readouterr().out.splitlines()
    assert head.startswith("Version\tArm\t")
    assert row.split("\t") == [
        "qa@2", "champion", "8 in all", "0", "25.0%", "95 ms", "-", "80 in all", "75.0% of 4", "5.0 MB",
    ]  # fmt: skip
    assert trial == "trial of qa@3 (split) against @2: evidence that it is worse: 40% of what decides"
    assert drift == "drift of qa@2: answer.length"


def test_rates_between_two_scrapes(served: tuple[Served, str]) -> None:
    made, _ = served
    before = parse_scrape(made.text())
    made.ask(4, 5.0)
    view = table_view(parse_scrape(made.text()), before, 2.0)
    assert view.title == "the last 2 s" and view.rows[0][2:8] == ("2.0", "0", "0.0%", "9.5 s", "-", "20")
    again = Served()  # a gateway that began anew counts from zero
    assert table_view(parse_scrape(again.text()), parse_scrape(made.text()), 2.0).rows[0][2] == "4.0"


def test_quantiles_are_those_of_prometheus() -> None:
    """By hand: 10 in [0, 1), 10 in [1, 2), none beyond; then some without an end."""
    buckets = {1.0: 10.0, 2.0: 20.0, math.inf: 20.0}
    assert [quantile_of(buckets, which) for which in (0.25, 0.5, 0.75, 1.0)] == [0.5, 1.0, 1.5, 2.0]
    assert quantile_of({1.0: 1.0, math.inf: 20.0}, 0.95) == math.inf
    assert quantile_of({}, 0.5) is None and quantile_of({1.0: 0.0, math.inf: 0.0}, 0.5) is None


def test_what_is_no_gateway(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, url = served
    assert command_line(["top", "--url", f"{url}/x", "--once"]) == 1
    assert "not the metrics of a gateway" in capsys.readouterr().err
    assert command_line(["top", "--url", "http://127.0.0.1:9", "--once"]) == 1
    assert "is it running?" in capsys.readouterr().err
    assert command_line(["top", "--every", "0"]) == 2


@pytest.mark.engine
def test_in_a_terminal_until_ctrl_c(served: tuple[Served, str]) -> None:
    """It draws again, and Ctrl-C is its normal end."""
    _, url = served
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lora2serve", "top", "--url", url, "--every", "0.2"],
        stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown, end = b"", time.monotonic() + 60
    while b"the last" not in shown and time.monotonic() < end:
        shown += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert b"qa@2" in shown and b"since the gateway began" in shown and b"the last " in shown
    os.close(ours)
