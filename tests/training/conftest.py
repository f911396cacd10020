"""One data set and one small base for all tests of training."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.runs import make_chat_model, rows, write_jsonl


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``data`` of a recipe: 24 training rows and 8 held-out ones, in chat form."""
    root = tmp_path_factory.mktemp("chats")
    train = write_jsonl(root / "train.jsonl", rows("train.jsonl", 24))
    return {"train": str(train), "eval": str(write_jsonl(root / "eval.jsonl", rows("eval.jsonl", 8)))}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of 0.2 million parameters with the demo's tokenizer."""
    return make_chat_model(tmp_path_factory.mktemp("small") / "base")


@pytest.fixture(scope="session", autouse=True)
def frozen_libraries(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the libraries bring is passed over by the collector, which training calls twice: a third of a short run.

    Only where something trains: loading them takes longer than all other tests here.
    """
    if not any(item.get_closest_marker("engine") for item in request.session.items):
        yield
        return
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    from matplotlib.figure import Figure  # noqa: F401
    from peft import PeftModel  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Here and in child processes: these models are too small for two, and the sums stay the same in all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
