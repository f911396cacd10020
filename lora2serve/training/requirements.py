"""Missing libraries, and errors of a machine that is too small, as TrainError with a hint."""

from __future__ import annotations

import errno
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lora2serve.errors import TrainError, first_line
from lora2serve.system.extras import install_hint

MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
DISK = ("No space left", "file write failed", "os error 28", "unexpected pos")  # of open(2), torch.save and safetensors


def check_libraries(quantize: str) -> None:
    """TrainError that names every library that is not installed, before the first of them is imported."""
    needed = ["torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "matplotlib"]
    needed += ["bitsandbytes"] if quantize != "none" else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainError(f"not installed: {', '.join(missing)}", install_hint("train"))


@contextmanager
def translated() -> Iterator[None]:
    """TrainError with a hint for a missing library, full memory and a full disk; everything else as it is."""
    try:
        yield
    except ImportError as error:
        raise TrainError(f"a library is missing: {first_line(error)}", install_hint("train")) from error
    except MemoryError as error:
        raise _out_of_memory(error) from error
    except Exception as error:  # bitsandbytes, safetensors and torch have classes of their own
        if "python -m bitsandbytes" in str(error):  # its library for this CUDA could not be loaded
            hint = "`python -m bitsandbytes` says why; train.quantize: none does without it"
            raise TrainError(f"bitsandbytes has no library that fits this GPU ({_cause(error)})", hint) from error
        if any(words in str(error) for words in MEMORY):
            raise _out_of_memory(error) from error
        if getattr(error, "errno", None) == errno.ENOSPC or any(words in str(error) for words in DISK):
            hint = "make room; `lora2serve train --resume` continues from the last complete checkpoint"
            raise TrainError("the disk is full: the run could not be saved", hint) from error
        raise


def _cause(error: BaseException) -> str:
    """The loader's own message, out of bitsandbytes' page of advice."""
    original = re.search(r"Original error: (.+)", str(error))
    return original[1].strip()[:200] if original else first_line(error)


def _out_of_memory(error: BaseException) -> TrainError:
    hint = "lower train.batch_size or data.max_length, and raise train.accumulation"
    return TrainError(f"out of memory ({first_line(error)})", hint)
