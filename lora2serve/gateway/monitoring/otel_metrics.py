"""The requests of a gateway under OpenTelemetry's names for generative AI, sent where an OTLP endpoint is set.

The names (gen_ai.server.request.duration and its neighbors, gen_ai.request.model, ...) are those of OpenTelemetry's
semantic conventions for generative AI, whose status is Development: they may change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora2serve.gateway.request_record import Feedback, RequestRecord
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter

ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SERVICE = "OTEL_SERVICE_NAME"
PATIENCE = 3.0  # seconds for what is left when the gateway ends
# The bounds that the conventions advise, in seconds.
DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = tuple(float(4**power) for power in range(14))
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}


def otel_observer(progress: Progress) -> OtelMetrics | None:
    """What sends each request; None where no endpoint is set, or opentelemetry is not there, which is said."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        return OtelMetrics(_provider())
    except ImportError as error:
        progress.warn(
            f"{error.name} is not installed: nothing is sent to the OTLP endpoint "
            "(pip install opentelemetry-sdk opentelemetry-exporter-otlp)"
        )
        return None


class OtelMetrics:
    """Hears of records, and lets OpenTelemetry send histograms of them from its own thread."""

    def __init__(self, provider: MeterProvider) -> None:
        self._provider = provider
        meter = provider.get_meter("lora2serve.gateway")
        self._seconds = meter.create_histogram(
            "gen_ai.server.request.duration",
            "s",
            "Duration of a request.",
            explicit_bucket_boundaries_advisory=DURATION,
        )
        self._first = meter.create_histogram(
            "gen_ai.server.time_to_first_token", "s", "Time to the first token of a stream.",
            explicit_bucket_boundaries_advisory=FIRST_TOKEN,
        )  # fmt: skip
        self._step = meter.create_histogram(
            "gen_ai.server.time_per_output_token", "s", "Time per token after the first.",
            explicit_bucket_boundaries_advisory=PER_TOKEN,
        )  # fmt: skip
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage", "{token}", "Tokens in and out.", explicit_bucket_boundaries_advisory=TOKENS
        )

    def on_request(self, record: RequestRecord) -> None:
        """A request is over."""
        own = attributes(record)
        self._seconds.record(record.seconds, own)
        if record.first_token_seconds is not None:
            self._first.record(record.first_token_seconds, own)
        if record.token_seconds is not None:
            self._step.record(record.token_seconds, own)
        for kind, count in (("input", record.prompt_tokens), ("output", record.completion_tokens)):
            if count is not None:
                self._tokens.record(count, {**own, "gen_ai.token.type": kind})

    def on_feedback(self, feedback: Feedback, records: tuple[RequestRecord, ...]) -> None:
        """The conventions have no name for it."""

    def close(self) -> None:
        """Send what is left, or let it go: a receiver that does not answer holds nobody up."""
        ending = threading.Thread(target=self._provider.shutdown, name="otlp", daemon=True)
        ending.start()
        ending.join(PATIENCE)


def attributes(record: RequestRecord) -> Mapping[str, str]:
    """By the conventions; the arm and the server, of which they say nothing, under a prefix of our own."""
    own = {
        "gen_ai.operation.name": OPERATIONS.get(record.path, "generate_content"),
        "gen_ai.provider.name": "lora2serve", "gen_ai.request.model": record.name,
        "gen_ai.response.model": f"{record.name}@{record.version}", "lora2serve.arm": record.arm,
        "lora2serve.upstream": record.upstream,
    }  # fmt: skip
    return {**own, "error.type": record.error} if record.error else own


def _provider() -> MeterProvider:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create({"service.name": os.environ.get(SERVICE) or "lora2serve-gateway"})
    return MeterProvider([PeriodicExportingMetricReader(_exporter())], resource, shutdown_on_exit=False)


def _exporter() -> MetricExporter:
    """By the protocol that is set, else HTTP. The endpoint, headers and timeouts are read from the environment."""
    protocol = next((value for name in PROTOCOLS if (value := os.environ.get(name))), "http/protobuf")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter()
