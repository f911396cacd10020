"""What is left of a request once it is answered, and of the feedback on it that comes later.

A request that was sent to two versions leaves two records of one ``request_id``, whose arms differ: that of the answer
which the client got, and ``shadow``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

Arm: TypeAlias = Literal["champion", "challenger", "shadow", "named"]  # named: a client chose the alias itself
R = TypeVar("R", bound="RequestRecord | Feedback")
IN_STREAM, CUT_OFF, TIMEOUT = "in_stream", "cut_off", "timeout"
REFUSED, CLIENT_LEFT = "refused", "client_left"  # errors that are not the version's, as far as one request shows
HASH_LENGTH = 16  # hexadecimal digits: 64 bits tell answers apart


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request to one version, and what came of it. Texts are there only where the configuration asks for them.

    ``sequence`` counts records and feedback of one store together, from 1; 0 for what could not be stored.
    """

    request_id: str
    at: float  # when it came: seconds since 1970, UTC
    name: str  # of the route: medical-qa
    version: int
    arm: Arm
    upstream: str
    unit: str  # keyed hash of whom it is from: the requests of one unit depend on each other
    path: str  # /v1/chat/completions
    status: int  # of HTTP; 0 where no answer began
    error: str = ""  # http (500 and over), in_stream, upstream_gone, timeout, cut_off, refused (4xx), client_left
    finish: str = ""  # why the first choice ended: stop, length, tool_calls, ...
    stream: bool = False
    seconds: float = 0.0  # from the request's last byte to the answer's
    first_token_seconds: float | None = None  # to the first byte of a stream's body
    token_seconds: float | None = None  # mean time between two events of a stream
    prompt_tokens: int | None = None  # as the server counts them
    completion_tokens: int | None = None
    prompt_length: int = 0  # characters
    answer_length: int = 0
    prompt_hash: str = ""  # ``text_hash`` of the text
    answer_hash: str = ""
    prompt: str | None = None
    answer: str | None = None
    features: Mapping[str, float] = field(default_factory=dict)  # figures of both texts, of many records
    sequence: int = 0

    @property
    def ok(self) -> bool:
        """Whether the version did its part: a client that left or was refused says nothing about it."""
        return self.error in ("", REFUSED, CLIENT_LEFT)


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """Ground truth on an answer: a score, a label, or the hash of the answer that was expected."""

    request_id: str
    at: float
    score: float | None = None  # 0 (wrong) to 1 (right)
    label: str = ""
    expected_hash: str = ""  # ``text_hash`` of the right answer
    sequence: int = 0

    def outcome(self, record: RequestRecord) -> float | None:
        """How right the answer in ``record`` was, 0 to 1; None where this says nothing of it.

        A score is of the answer that the client saw; an expected answer is compared with that of any arm.
        """
        if self.expected_hash:
            return float(self.expected_hash == record.answer_hash)
        return None if record.arm == "shadow" else self.score


DEFAULTS: Mapping[type, Mapping[str, object]] = {
    kind: {spec.name: spec.default for spec in fields(kind)} for kind in (RequestRecord, Feedback)
}


@runtime_checkable
class TrafficObserver(Protocol):
    """Hears of every record and feedback once it is stored, in order, always in the same thread, which may wait."""

    def on_request(self, record: RequestRecord) -> None:
        """An answer is complete, or will not be."""
        ...

    def on_feedback(self, feedback: Feedback, records: tuple[RequestRecord, ...]) -> None:
        """Ground truth came, on the request that left these records, one for each arm."""
        ...


def text_hash(text: str) -> str:
    """What two equal texts share, whatever white space stands around them."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()[:HASH_LENGTH]


def unit_hash(secret: bytes, name: str, unit: str) -> str:
    """Whom a request is from, so that nobody without the secret can say who."""
    return hmac.digest(secret, f"{name}\0{unit}".encode("utf-8", "surrogatepass"), "sha256").hex()[:HASH_LENGTH]


def to_text(entry: RequestRecord | Feedback) -> str:
    """One line of JSON, without what is at its default."""
    defaults = DEFAULTS[type(entry)]
    content = {key: value for key, value in vars(entry).items() if value != defaults[key] and value != {}}
    return json.dumps({**content, "sequence": entry.sequence}, ensure_ascii=True, separators=(",", ":"))


def from_text(kind: type[R], text: str, sequence: int) -> R:
    """The entry in a line that any version has written: keys that this one does not know are passed over."""
    known = DEFAULTS[kind]
    content = {key: value for key, value in json.loads(text).items() if key in known}
    return kind(**{**content, "sequence": sequence})
