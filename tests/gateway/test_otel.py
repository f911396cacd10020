"""OpenTelemetry: what a receiver of OTLP gets, by OpenTelemetry's own protobuf."""

from __future__ import annotations

import gzip
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from lora2serve.gateway.monitoring import otel_metrics
from lora2serve.gateway.monitoring.otel_metrics import ENDPOINTS, otel_observer
from lora2serve.gateway.request_record import RequestRecord

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.metric_exporter")


class Heard(list[str]):
    """A progress that keeps what it is told."""

    note = warn = list.append


def record(version: int, **values: object) -> RequestRecord:
    return RequestRecord(
        request_id="r", at=0.0, name="qa", version=version, arm="champion", upstream="prod", unit="u",
        path="/v1/chat/completions", status=200, seconds=0.5, **values,  # type: ignore[arg-type]
    )  # fmt: skip


def test_what_a_receiver_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    observer = otel_observer(Heard())  # type: ignore[arg-type]
    assert observer
    observer.on_request(record(1, first_token_seconds=0.1, token_seconds=0.01, prompt_tokens=7, completion_tokens=9))
    observer.on_request(record(2, error="timeout"))
    observer.close()
    server.shutdown()
    server.server_close()
    request = ExportMetricsServiceRequest()
    request.ParseFromString(bodies[-1])
    (resource,) = request.resource_metrics
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "lora2serve-gateway"
    points = {
        (metric.name, *sorted((a.key, a.value.string_value) for a in point.attributes)): (point.count, point.sum)
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.histogram.data_points
    }
    shared = [
        ("gen_ai.operation.name", "chat"), ("gen_ai.provider.name", "lora2serve"), ("gen_ai.request.model", "qa"),
        ("gen_ai.response.model", "qa@1"), ("lora2serve.arm", "champion"), ("lora2serve.upstream", "prod"),
    ]  # fmt: skip
    assert points["gen_ai.server.request.duration", *shared] == (1, 0.5)
    assert points["gen_ai.server.time_to_first_token", *shared] == (1, 0.1)
    assert points["gen_ai.server.time_per_output_token", *shared] == (1, 0.01)
    for kind, count in (("input", 7), ("output", 9)):
        assert points["gen_ai.client.token.usage", *sorted([*shared, ("gen_ai.token.type", kind)])] == (1, count)
    failed = [key for key in points if ("error.type", "timeout") in key]
    assert len(failed) == 1 and ("gen_ai.response.model", "qa@2") in failed[0]


def test_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    heard = Heard()
    assert otel_observer(heard) is None and heard == []  # type: ignore[arg-type]


def test_a_receiver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway ends without it: what is left is sent by a thread that nobody waits for."""
    monkeypatch.setattr(otel_metrics, "PATIENCE", 0.05)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{hole.getsockname()[1]}")
        observer = otel_observer(Heard())  # type: ignore[arg-type]
        assert observer
        observer.on_request(record(1))
        observer.close()
        (sending,) = [thread for thread in threading.enumerate() if thread.name == "otlp"]
        assert sending.daemon
    sending.join()
