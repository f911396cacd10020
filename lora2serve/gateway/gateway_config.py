"""``gateway.yaml``: the servers behind a gateway, how traffic is split, and what of it is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from lora2serve.config.bounds import Range
from lora2serve.config.schema import build, read_keys, show
from lora2serve.errors import RecipeError, UsageError
from lora2serve.gateway.decisions.decision_rules import DecisionRecipe
from lora2serve.registry.version_reference import parse_reference, refuse_alias
from lora2serve.system.http import check_address

EXAMPLE = "such as `upstreams: {prod: {url: 'http://localhost:8000'}}`; docs/gateway.md has all keys"
FOLDER = "gateway"  # of the records, and of the secret that units are hashed with
Share = Annotated[float, Range(0.0, 1.0)]


@dataclass(frozen=True)
class UpstreamConfig:
    """A server of OpenAI's API: vLLM, llama.cpp, Ollama or any other."""

    url: str = ""
    adapters: bool = True  # whether adapters may be loaded there: vLLM, started with --allow-updates
    serves: Mapping[str, str] = field(default_factory=dict)  # medical-qa@7 -> what that version is called there
    max_cpu_loras: Annotated[int, Range(1, 10_000)] = 8  # adapters that it holds at most; vLLM's option of that name
    key: str = ""  # environment variable of the key for the gateway's own calls, such as loading an adapter
    folder: str = ""  # where copies of adapters go; the server must see them by the same path
    timeout: Annotated[float, Range(0.1, 86_400)] = 600.0  # seconds that it may be silent


@dataclass(frozen=True)
class ChallengerConfig:
    """The version that gets a part of the traffic, and answers it."""

    alias: str = "challenger"
    share: Share = 0.1  # of the units (users, sessions): each always gets the same version


@dataclass(frozen=True)
class ShadowConfig:
    """The version that gets copies of requests, whose answers nobody sees."""

    alias: str = "shadow"
    share: Share = 1.0  # of the requests
    queue: Annotated[int, Range(1, 100_000)] = 100  # copies that wait; more are dropped, and counted
    parallel: Annotated[int, Range(1, 1000)] = 2  # copies that are under way
    timeout: Annotated[float, Range(0.1, 86_400)] = 60.0  # seconds for a copy


@dataclass(frozen=True)
class RouteConfig:
    """How the traffic of one name is split."""

    challenger: ChallengerConfig = ChallengerConfig()
    shadow: ShadowConfig = ShadowConfig()
    decisions: DecisionRecipe = field(default_factory=DecisionRecipe)  # when either is stopped or promoted by itself
    unit_header: str = "x-session-id"  # says whom a request is from; else the body's `user`, else how the chat begins


@dataclass(frozen=True)
class CaptureConfig:
    """What is recorded. Lengths, hashes, finish reasons and times always are."""

    folder: str = FOLDER
    texts: Share = 0.0  # of the requests whose prompts and answers are kept
    longest_text: Annotated[int, Range(1, 1 << 24)] = 10_000  # characters that are kept of each
    redact: str = ""  # package.module:function, which gets each text before it is kept and returns it
    most_bytes: Annotated[int, Range(1 << 20, 1 << 50)] = 1 << 30  # of the file; then the oldest go


@dataclass(frozen=True)
class LimitConfig:
    """What is refused."""

    body_bytes: Annotated[int, Range(1 << 10, 1 << 40)] = 32 << 20
    header_bytes: Annotated[int, Range(1 << 10, 1 << 24)] = 32 << 10
    requests: Annotated[int, Range(1, 1_000_000)] = 1000  # at once


@dataclass(frozen=True)
class GatewayConfig:
    """A whole gateway. The first upstream gets what no route is for. Names without a route have the defaults."""

    upstreams: Mapping[str, UpstreamConfig] = field(default_factory=dict)
    routes: Mapping[str, RouteConfig] = field(default_factory=dict)
    capture: CaptureConfig = CaptureConfig()
    limits: LimitConfig = LimitConfig()
    feedback_key: str = "LORA2SERVE_FEEDBACK_KEY"  # environment variable of the key for POST /v1/feedback
    admin_key: str = "LORA2SERVE_ADMIN_KEY"  # of the key for /gateway/routes

    def route(self, name: str) -> RouteConfig:
        """How traffic of that name is split."""
        return self.routes.get(name, DEFAULT_ROUTE)


DEFAULT_ROUTE = RouteConfig()


def load(path: Path | None, upstreams: Sequence[str], *, inside: str = "") -> GatewayConfig:
    """The file, and ``NAME=URL`` over what it says of upstreams; RecipeError with every problem.

    inside: the upstream in whose process this is, which has no address.
    """
    config, problems, source = GatewayConfig(), list[str](), ""
    if path is not None:
        content, problems = read_keys(path, EXAMPLE)
        config, source = build(GatewayConfig, content, problems), f"{path}: "
    config = replace(config, upstreams={**config.upstreams, **_of_words(config, upstreams)})
    if not config.upstreams and not inside and not any(problem.startswith("upstreams") for problem in problems):
        problems.append("upstreams: none, expected one or more")
    problems += _problems(config, inside)
    if problems:
        raise RecipeError("\n".join(f"{source}{problem}" for problem in problems), EXAMPLE)
    return config


def _of_words(config: GatewayConfig, words: Sequence[str]) -> dict[str, UpstreamConfig]:
    found: dict[str, UpstreamConfig] = {}
    for word in words:
        name, equals, url = word.partition("=")
        if not equals or not name or not url:
            raise UsageError(f"--upstream {word}: expected NAME=URL", "such as --upstream prod=http://localhost:8000")
        if name in found:
            raise UsageError(f"--upstream {name}: given twice")
        found[name] = replace(config.upstreams.get(name, UpstreamConfig()), url=url)
    return found


def _problems(config: GatewayConfig, inside: str) -> list[str]:
    problems = list[str]()
    for name, upstream in config.upstreams.items():
        where = f"upstreams.{name}"
        if not upstream.url and name != inside:
            problems.append(f"{where}.url: missing")
        elif upstream.url:
            try:
                check_address(upstream.url)
            except UsageError as error:
                problems.append(f"{where}.url: {error.message}")
        for version in upstream.serves:
            reference = parse_reference(version)
            if reference is None or reference.number is None or reference.export:
                problems.append(f"{where}.serves: {show(version)}, expected NAME@NUMBER, such as medical-qa@7")
    for name, route in config.routes.items():
        for role in ("challenger", "shadow"):
            alias = str(getattr(route, role).alias)
            try:
                refuse_alias(alias)
            except UsageError as error:
                problems.append(f"routes.{name}.{role}.alias: {error.message}")
        problems += route.decisions.problems(f"routes.{name}.decisions")
        if not route.unit_header.isascii() or not route.unit_header.strip():
            problems.append(f"routes.{name}.unit_header: {show(route.unit_header)}, expected the name of a header")
    if config.capture.redact and ":" not in config.capture.redact:
        problems.append(f"capture.redact: {show(config.capture.redact)}, expected package.module:function")
    return problems
