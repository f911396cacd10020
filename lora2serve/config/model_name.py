"""What a model, an adapter or a run may be called: its name becomes part of paths, commands and requests."""

from __future__ import annotations

import re

from lora2serve.errors import UsageError

LONGEST = 200  # bytes: a file's name has 255 at most, and types, numbers and endings come behind it
LONGEST_IN_OLLAMA = 60  # characters: it takes 80, and "-adapter" comes behind it
RESERVED = re.compile(r"latest|(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # ours, and Windows' devices
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def refuse_name(name: str, source: str, way_out: str = "", *, chosen: bool = True) -> None:
    """UsageError for what is no plain name; ``source`` says where it comes from, such as ``--name``.

    A directory that was there before may have a name that nobody should choose (``chosen``), such as "latest".
    """
    if expected := _expected(name, reserved=chosen):
        raise UsageError(f"{source}: {_shown(name)}, expected {expected}", way_out)


def refuse_run_name(name: str, source: str) -> None:
    """UsageError for what cannot name a run's directory."""
    if problem := run_name_problem(name):
        raise UsageError(f"{source}: {problem}")


def run_name_problem(name: str) -> str:
    """What is wrong with it, and what was expected; empty where nothing is. Runs are typed often, so these are few
    characters.
    """
    plain = RUN.fullmatch(name) is not None
    expected = _expected(name) if plain else "letters, digits, '.', '_' and '-', the first a letter or a digit"
    return f"{_shown(name)}, expected {expected}" if expected else ""


def ollama_name(name: str, target: str) -> str:
    """What an export is called in Ollama, which takes other characters (``types/model/name.go`` in its repository).

    An adapter has a name of its own: the merged model of the same run stays beside it.
    """
    plain = re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-.")[:LONGEST_IN_OLLAMA].rstrip("-.") or "model"
    return f"{plain}-adapter" if target == "ollama-adapter" else plain


def _expected(name: str, *, reserved: bool = True) -> str:
    """What was expected instead; empty for a plain name."""
    if not name.strip() or name != name.strip() or not name.isprintable():
        return "a name of printable characters, without spaces around it"
    if "/" in name or "\\" in name or name[0] in ".-":
        return "a plain name: no '/' or '\\' in it, no '.' or '-' before it"
    if len(name.encode("utf-8", "replace")) > LONGEST:
        return f"{LONGEST} bytes at most"
    return "another name, this one is reserved" if reserved and RESERVED.fullmatch(name) else ""


def _shown(name: str) -> str:
    text = ascii(name) if not name.isprintable() else repr(name)
    return text if len(text) <= 60 else f"{text[:57]}..."
