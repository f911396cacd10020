"""The way to the Hub: who we are, and its errors as one line with the way out.

huggingface_hub finds the token by itself (``HF_TOKEN``, or what ``hf auth login`` stored); it never
passes through our hands, so it cannot get into an argument, a log or a file of ours.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lora2serve.errors import HubError, UsageError, did_you_mean
from lora2serve.hub.retry import broken_line, causes
from lora2serve.hub.secret_scan import masked
from lora2serve.progress import Progress, Silent

Kind = Literal["model", "dataset"]

LOG_IN = "log in (`hf auth login`) or set HF_TOKEN"
PUSHING = "pushing to"
ASKING = "asking the Hub about"  # a repository of which nothing is to be fetched


def has_token() -> bool:
    """Whether huggingface_hub finds a token."""
    from huggingface_hub import get_token

    return get_token() is not None


def page(repo_id: str) -> str:
    """The address of a repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"


def check_id(repo_id: str) -> None:
    """Refuse what cannot be a repository's id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(f"{repo_id!r}: not a repository id, expected org/name") from None


def refuse_id(repo_id: str, option: str) -> None:
    """Refuse what cannot be the id of a repository of one's own; ``option`` is where it was named."""
    check_id(repo_id)
    if "/" not in repo_id:
        raise UsageError(f"{option}{repo_id}: expected user/name", "`hf auth whoami` says who you are")


@contextmanager
def hub_quiet() -> Iterator[None]:
    """huggingface_hub's own bars and warnings off: progress and errors are told by us."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, hub_progress = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(40)  # errors only, as logging.ERROR
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hub_progress and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:
            enable_progress_bars()


@contextmanager
def hub_progress(progress: Progress) -> Iterator[None]:
    """huggingface_hub's own bars, which know how far each file is, unless ``progress`` says nothing.

    Only on a terminal: those of Xet would draw anywhere.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    wanted = (
        sys.stderr is not None and sys.stderr.isatty() and not getattr(progress, "quiet", isinstance(progress, Silent))
    )
    off = are_progress_bars_disabled()
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:  # else the user has decided
        (enable_progress_bars if wanted else disable_progress_bars)()
    try:
        yield
    finally:
        if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:
            (disable_progress_bars if off else enable_progress_bars)()


@contextmanager
def hub_errors(
    repo_id: str, revision: str | None = None, doing: str = "reading", kind: Kind = "model"
) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into a ``HubError``."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError:
        known = _revisions(repo_id, kind)
        hint = f"it has: {', '.join(known[:20])}" if known else ""
        raise HubError(f"{repo_id}: no revision {revision!r}{did_you_mean(revision or '', known)}", hint) from None
    except errors.GatedRepoError:
        yours = "your token has no access" if has_token() else "there is no token"
        address = page(f"datasets/{repo_id}" if kind == "dataset" else repo_id)
        hint = f"ask for access at {address}" + ("" if has_token() else f", then {LOG_IN}")
        raise HubError(f"{repo_id}: gated, and {yours}", hint) from None
    except errors.RepositoryNotFoundError:
        what = "data set" if kind == "dataset" else "repository"
        raise HubError(f"{repo_id}: no such {what}, or a private one", _spelling()) from None
    except errors.HfHubHTTPError as error:
        raise _http_error(repo_id, doing, error) from None
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError) as error:
        raise _unreachable(repo_id, revision, doing, error, kind) from None
    except (errors.OfflineModeIsEnabled, httpx2.HTTPError) as error:
        raise _unreachable(repo_id, revision, doing, error, kind) from None
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            raise
        if not isinstance(error, OSError):
            raise _wrapped(repo_id, revision, doing, error) from None
        raise HubError(f"{doing} {repo_id}: no space left on the disk", "HF_HOME moves the Hub's cache") from None


def _spelling() -> str:
    return "check the spelling" + ("; your token must be allowed to read it" if has_token() else f"; or {LOG_IN}")


def _http_error(repo_id: str, doing: str, error: Exception) -> HubError:
    status = error.response.status_code  # type: ignore[attr-defined]
    reason = getattr(error, "server_message", None) or ""
    why = f" ({clean(reason)})" if reason else ""
    if status == 401:
        from_environment = os.environ.get("HF_TOKEN")
        hint = "HF_TOKEN holds it: set another, or unset it and `hf auth login`" if from_environment else LOG_IN
        return HubError(f"{doing} {repo_id}: the token was refused{why}", hint)
    if status == 403:
        return HubError(
            f"{doing} {repo_id}: forbidden{why}", "use a token with write access to it" if has_token() else LOG_IN
        )
    if status == 429:
        return HubError(f"{doing} {repo_id}: too many requests", "wait some minutes and run again: it resumes")
    if status >= 500:
        return HubError(f"{doing} {repo_id}: the Hub answers {status}{why}", "run again later: it resumes")
    return HubError(f"{doing} {repo_id}: the Hub answers {status}{why}")


def _wrapped(repo_id: str, revision: str | None, doing: str, error: Exception) -> Exception:
    """The cause of an error that huggingface_hub raised from a thread or a parser; other errors stay what they are."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            return _http_error(repo_id, doing, cause)
    if broken_line(error):
        return _unreachable(repo_id, revision, doing, error)
    if "JSON" in type(error).__name__:
        return HubError(f"{doing} {repo_id}: the Hub's answer is not JSON", "run again later: it resumes")
    return error


def _unreachable(repo_id: str, revision: str | None, doing: str, error: Exception, kind: Kind = "model") -> HubError:
    from huggingface_hub import constants

    if doing in (PUSHING, ASKING):
        if constants.is_offline_mode():
            return HubError(f"{doing} {repo_id}: HF_HUB_OFFLINE is set", "unset it, or set it to 0")
        return HubError(
            f"{doing} {repo_id}: {constants.ENDPOINT} cannot be reached",
            "check the network and HF_ENDPOINT, then run again: it resumes",
        )
    wanted = f"{repo_id}@{revision}" if revision else repo_id
    if constants.is_offline_mode():
        return HubError(
            f"{wanted}: no complete copy in the cache, and HF_HUB_OFFLINE is set",
            f"fetch it once online: HF_HUB_OFFLINE=0 hf download {repo_id}"
            + (" --repo-type dataset" if kind == "dataset" else "")
            + (f" --revision {revision}" if revision else ""),
        )
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error.__cause__, HfHubHTTPError):
        return _http_error(repo_id, "reading", error.__cause__)
    return HubError(
        f"{wanted}: {constants.ENDPOINT} cannot be reached, and the cache has no complete copy",
        "check the network and HF_ENDPOINT, or name a local directory",
    )


def _revisions(repo_id: str, kind: Kind) -> list[str]:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo_id, repo_type=kind)
    except Exception:  # only for a better hint: the error that is shown is another one
        return []
    return [ref.name for ref in [*refs.branches, *refs.tags]]


def clean(text: str) -> str:
    """A server's words on one line, with anything shaped like a token taken out."""
    return masked(" ".join(text.split()))[:300]
