"""What a gateway lets through: paths, sizes, and who may see and say what is the gateway's own."""

from __future__ import annotations

import hmac
import os
import posixpath
import secrets
from contextlib import suppress
from pathlib import Path

from lora2serve.gateway.upstreams import Headers, header
from lora2serve.progress import Progress

SECRET = "secret"  # the file in the folder of the records
SECRET_VARIABLE = "LORA2SERVE_GATEWAY_SECRET"  # for gateways on several machines
LONGEST_ID = 128
# What changes a server for everybody: loading adapters, weights, sleep, profiles. By the last or the first of its path.
CLOSED_ENDS = {
    "load_lora_adapter", "unload_lora_adapter", "reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache",
    "collective_rpc", "sleep", "wake_up", "release_kv_cache_memory", "pause", "resume", "abort_requests",
    "start_profile", "stop_profile", "scale_elastic_ep", "is_scaling_elastic_ep", "server_info",
    "init_weight_transfer_engine", "shutdown_weight_transfer_engine", "start_weight_update",
    "start_draft_weight_update", "update_weights", "finish_weight_update", "update_weight_version", "weight_checker",
    "pull", "push", "create", "copy", "delete", "lora-adapters", "slots", "props",
}  # fmt: skip
CLOSED_BEGINNINGS = {"adapters", "fault_tolerance", "metrics", "gateway"}


def is_closed(path: str) -> bool:
    """Whether clients may not reach a path of a server. ``path`` is decoded; some servers take ``.`` and ``..`` out."""
    return _is_closed(path) or _is_closed(posixpath.normpath(path))


def _is_closed(path: str) -> bool:
    parts = [part.lower() for part in path.split("/") if part]
    blobs = parts[:2] == ["api", "blobs"]  # of Ollama
    return bool(parts) and (blobs or parts[0] in CLOSED_BEGINNINGS or parts[-1] in CLOSED_ENDS)


def is_authorized(headers: Headers, variable: str) -> bool | None:
    """Whether a request has the key that the variable holds, as a bearer; None where there is no key."""
    key = os.environ.get(variable, "")
    if not key:
        return None
    sent = header(headers, b"authorization").removeprefix(b"Bearer ").strip()
    return hmac.compare_digest(sent, key.encode())


def request_id(headers: Headers) -> str:
    """The client's ``X-Request-Id`` where it can be one, else a new one."""
    sent = header(headers, b"x-request-id").decode("latin-1")
    return sent if is_request_id(sent) else secrets.token_hex(16)


def is_request_id(text: str) -> bool:
    """Whether requests on record may have such an id."""
    return 0 < len(text) <= LONGEST_ID and text.isascii() and all(char.isalnum() or char in "-_.:" for char in text)


def header_bytes(headers: Headers) -> int:
    """Bytes of all headers."""
    return sum(len(name) + len(value) + 4 for name, value in headers)


def read_secret(folder: Path, progress: Progress) -> bytes:
    """What units are hashed with: of the environment, else the one in ``folder``, which is made once."""
    if os.environ.get(SECRET_VARIABLE):
        return os.environ[SECRET_VARIABLE].encode()
    path = folder / SECRET
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        found = path.read_bytes()
        if len(found) >= 16:
            return found
        problem = "damaged"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    progress.warn(f"{path}: {problem}: who gets the challenger is drawn anew when the gateway starts again")
    return secrets.token_bytes(32)
