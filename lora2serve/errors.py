"""Every failure that a user can meet, as one tree:

Lora2ServeError           exit 1, unless a class below says otherwise
├── UsageError            exit 2: an option or argument that cannot be
│   └── RecipeError       exit 2: all problems of one recipe, each with its key path
├── InputError            a file handed to us is not what it should be
│   ├── CheckpointError   a base model directory
│   ├── AdapterError      a PEFT adapter directory
│   └── DataError         a data set
├── MergeError            base and adapter do not go together, or give no usable weights
├── ExportError           a target refuses the model, or its files cannot be written
├── EngineError           an engine is missing, dies or hangs
├── TrainError            training cannot start or go on
│   └── EndedTogether     another process of the same training has ended, and says why: not shown
├── HubError              the Hub, the network or its cache
├── RegistryError         a registry cannot be read or written
├── SweepError            a sweep's storage cannot be read or written, or none of its trials gives a loss
├── ParityNotMet          exit 3: an export does not answer like the trained model
└── GateNotMet            exit 3: a version may not become what it was to be

A message is one line: what, which value, what was expected. ``hint`` is the way out.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

WAYS_OUT = {
    errno.EACCES: "run it in a folder that you may write to",
    errno.EROFS: "run it in a folder that you may write to",
    errno.ENOSPC: "make room on that disk, and run it again",
}
LONGEST_WORD = 200  # characters: what is longer is no slip of the pen, and difflib would take hours


class Lora2ServeError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(Lora2ServeError):
    """An option or argument that cannot be."""

    exit_code = 2


class RecipeError(UsageError):
    """All problems of one recipe, one per line."""


class InputError(Lora2ServeError):
    """A file handed to us is not what it should be."""


class CheckpointError(InputError):
    """A base model directory that cannot be read."""


class AdapterError(InputError):
    """A PEFT adapter directory that cannot be read."""


class DataError(InputError):
    """A data set that cannot be read."""


class MergeError(Lora2ServeError):
    """Base and adapter do not go together, or give no usable weights."""


class ExportError(Lora2ServeError):
    """A target refuses the model, or its files cannot be written."""


class EngineError(Lora2ServeError):
    """An engine is missing, dies or hangs."""


class TrainError(Lora2ServeError):
    """Training cannot start or go on."""


class EndedTogether(TrainError):
    """Another process of the same training has ended, and says why: this one ends without a word."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this training has ended, and says why")
        self.exit_code = exit_code


class HubError(Lora2ServeError):
    """The Hub, the network or its cache."""


class RegistryError(Lora2ServeError):
    """A registry cannot be read or written."""


class SweepError(Lora2ServeError):
    """A sweep's storage cannot be read or written, or none of its trials gives a loss."""


class ParityNotMet(Lora2ServeError):
    """An export does not answer like the trained model."""

    exit_code = 3


class GateNotMet(Lora2ServeError):
    """A version may not become what it was to be; the message names each gate."""

    exit_code = 3


def of_system(error: OSError) -> Lora2ServeError:
    """What the system refuses, such as a full disk or a folder that may not be written, as an error of one line."""
    where = f"{error.filename}: " if error.filename else ""
    return Lora2ServeError(f"{where}{error.strerror or first_line(error)}", WAYS_OUT.get(error.errno or 0, ""))


def first_line(error: BaseException) -> str:
    """The first line of a message, at most 200 characters; the class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """``" (did you mean 'rank'?)"``, or an empty string when nothing is near; ``prefix`` goes before the near one."""
    lowered = {name.lower(): name for name in known}  # VLLM is near to vllm
    near = get_close_matches(word.lower(), lowered, n=1) if len(word) < LONGEST_WORD else []
    return f" (did you mean {prefix + lowered[near[0]]!r}?)" if near else ""


def raise_all(problems: Sequence[str], error: Callable[[str], Exception] = CheckpointError) -> None:
    """All problems of one input at once, the first twenty of them in words."""
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise error("\n".join([*problems[:20], *more]))
