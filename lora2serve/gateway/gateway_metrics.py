"""The figures of a gateway, as Prometheus reads them: by adapter, version and arm, never by what a client made up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, TypeAlias

from lora2serve.gateway.adapter_cache import Key
from lora2serve.gateway.request_record import REFUSED, Feedback, RequestRecord

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

    Labelled: TypeAlias = Counter | Gauge | Histogram

OTHER = ("other", "", "")  # the labels of all requests that no route is for
MOST_VERSIONS = 20  # of a name that have figures; then those of the one that came first go
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds of an answer
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # to its first byte
STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)  # between two tokens
ARM = ("adapter", "version", "arm")


@dataclass(frozen=True)
class _ArmSeries:
    """The figures of a version in one arm."""

    requests: Callable[[str, str], Counter]  # by upstream and code
    seconds: Histogram
    first: Histogram
    step: Histogram
    prompt: Counter
    completion: Counter
    in_flight: Gauge


class GatewayMetrics:
    """All figures. ``registry`` is prometheus-client's; others may add theirs to it."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"lora2serve_{name}", help, labels, registry=self.registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"lora2serve_{name}", help, labels, registry=self.registry)

        def seconds(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"lora2serve_{name}_seconds", help, labels, registry=self.registry, buckets=buckets)

        self._requests = counter("requests", "Requests that are over.", *ARM, "upstream", "code")
        self._errors = counter("errors", "Requests that failed.", *ARM, "kind")
        self._seconds = seconds("request", "From a request to the end of its answer.", WHOLE, *ARM)
        self._first = seconds("first_token", "To the first byte of a stream.", FIRST, *ARM)
        self._step = seconds("inter_token", "Mean time between two tokens of a stream.", STEP, *ARM)
        self._tokens = counter("tokens", "Tokens, as the server counts them.", *ARM, "kind")
        self._in_flight = gauge("in_flight", "Requests under way.", *ARM)
        self._truth = counter("truth", "Answers that feedback came for.", *ARM, "outcome")
        self._loads = counter("adapter_loads", "Loads of adapters.", "adapter", "version", "upstream", "result")
        self._load = seconds("adapter_load", "Loading and warming an adapter.", WHOLE, "upstream")
        self._resident = gauge("adapter_resident", "Adapters that a server has.", "adapter", "version", "upstream")
        self._bytes = gauge("adapter_bytes", "Bytes on disk, and in a slot.", "adapter", "version", "where")
        self._alias = gauge("alias_version", "The version that answers for an alias.", "adapter", "alias")
        self._dropped = counter("shadow_dropped", "Copies that were not sent.", "adapter", "reason")
        self._lost = counter("records_dropped", "Records that were not stored.", "reason")
        self._registry_up = gauge("registry_up", "Whether the registry could be read.")
        self._versions: dict[str, OrderedDict[str, None]] = {}
        self._arms: dict[tuple[str, str, str], _ArmSeries] = {}

    def text(self) -> bytes:
        """What a scrape gets."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def begun(self, name: str, version: int, arm: str) -> None:
        """A request to a version."""
        self._arm(name, str(version), arm).in_flight.inc()

    def finished(self, record: RequestRecord) -> None:
        """It is over."""
        labels = (record.name, str(record.version), record.arm)
        arm = self._arm(*labels)
        arm.in_flight.dec()
        arm.requests(record.upstream, str(record.status)).inc()
        arm.seconds.observe(record.seconds)
        if record.error not in ("", REFUSED):
            self._errors.labels(*labels, record.error).inc()
        if record.first_token_seconds is not None:
            arm.first.observe(record.first_token_seconds)
        if record.token_seconds is not None:
            arm.step.observe(record.token_seconds)
        if record.prompt_tokens is not None:
            arm.prompt.inc(record.prompt_tokens)
        if record.completion_tokens is not None:
            arm.completion.inc(record.completion_tokens)

    def _arm(self, name: str, version: str, arm: str) -> _ArmSeries:
        """The series of one arm, looked up once."""
        key = (name, version, arm)
        if key not in self._arms:
            self._seen(name, version)
            self._arms[key] = _ArmSeries(
                cache(partial(self._requests.labels, *key)), self._seconds.labels(*key), self._first.labels(*key),
                self._step.labels(*key), self._tokens.labels(*key, "prompt"), self._tokens.labels(*key, "completion"),
                self._in_flight.labels(*key),
            )  # fmt: skip
        return self._arms[key]

    def other(self, upstream: str, status: int, seconds: float) -> None:
        """A request that no route is for is over."""
        self._requests.labels(*OTHER, upstream, str(status)).inc()
        self._seconds.labels(*OTHER).observe(seconds)

    def on_request(self, record: RequestRecord) -> None:
        """Nothing: figures do not wait for the disk."""

    def on_feedback(self, feedback: Feedback, records: tuple[RequestRecord, ...]) -> None:
        """Ground truth on an answer."""
        for record in records:
            outcome = feedback.outcome(record)
            if outcome is not None:
                word = "right" if outcome >= 0.5 else "wrong"
                self._truth.labels(record.name, str(record.version), record.arm, word).inc()

    def loaded(self, key: Key, upstream: str, result: str, seconds: float) -> None:
        """A load ended."""
        name, version = key[0], str(key[1])
        self._loads.labels(name, version, upstream, result).inc()
        if result == "ok":
            self._load.labels(upstream).observe(seconds)
            self._resident.labels(name, version, upstream).set(1)
        self._seen(name, version)

    def unloaded(self, key: Key, upstream: str) -> None:
        """An adapter made room."""
        self._resident.labels(key[0], str(key[1]), upstream).set(0)

    def size(self, key: Key, disk: int, slot: int) -> None:
        """Bytes of an adapter."""
        for where, size in (("disk", disk), ("slot", slot)):
            self._bytes.labels(key[0], str(key[1]), where).set(size)

    def registry_seen(self, ok: bool) -> None:
        """Whether the registry could be read."""
        self._registry_up.set(ok)

    def moved(self, name: str, numbers: Mapping[str, int]) -> None:
        """The versions of a name's aliases."""
        self._alias.remove_by_labels({"adapter": name})
        for alias, number in numbers.items():
            self._alias.labels(name, alias).set(number)

    def shadow_dropped(self, name: str, reason: str) -> None:
        """A copy was not sent."""
        self._dropped.labels(name, reason).inc()

    def records_dropped(self, count: int, reason: str) -> None:
        """Records were not stored."""
        self._lost.labels(reason).inc(count)

    def _seen(self, name: str, version: str) -> None:
        """Bound how many versions have figures, however long the gateway runs."""
        versions = self._versions.setdefault(name, OrderedDict())
        versions[version] = None
        if len(versions) > MOST_VERSIONS:
            gone = next(iter(versions))
            self._arms = {key: series for key, series in self._arms.items() if key[:2] != (name, gone)}
            oldest = {"adapter": name, "version": versions.popitem(last=False)[0]}
            for family in (
                self._requests, self._errors, self._seconds, self._first, self._step, self._tokens, self._in_flight,
                self._truth, self._loads, self._resident, self._bytes,
            ):  # fmt: skip
                family.remove_by_labels(oldest)
