"""What the libraries raise when the machine is too small, in our words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from lora2serve.errors import TrainError

EXTRA = "pip install 'lora2serve[train]'"
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
DISK = ("No space left", "file write failed", "os error 28", "unexpected pos")  # of open(2), torch.save and safetensors


@contextmanager
def translated() -> Iterator[None]:
    """TrainError with a way out for a missing library, full memory and a full disk; everything else as it is."""
    try:
        yield
    except ImportError as error:
        raise TrainError(f"a library is missing: {first_line(error)}", EXTRA) from error
    except MemoryError as error:
        raise _out_of_memory(error) from error
    except Exception as error:  # safetensors and torch have classes of their own
        if any(words in str(error) for words in MEMORY):
            raise _out_of_memory(error) from error
        if getattr(error, "errno", None) == errno.ENOSPC or any(words in str(error) for words in DISK):
            hint = "make room; `lora2serve train --resume` goes on from the last whole checkpoint"
            raise TrainError("the disk is full: the run could not be saved", hint) from error
        raise


def _out_of_memory(error: BaseException) -> TrainError:
    hint = "lower train.batch_size or data.max_length, and raise train.accumulation"
    return TrainError(f"out of memory ({first_line(error)})", hint)


def first_line(error: BaseException) -> str:
    """The first line of a message, at most 200 characters; the class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
