"""What a large vocabulary costs: one text at a time, never all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from lora2serve.data.prompts import PromptSet, ScoredText
from lora2serve.parity_check.worker import SavedLogits
from lora2serve.system import fork_client
from tests.conftest import lora2serve
from tests.support.tiny import make_model

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "base"
VOCABULARY, WINDOW = 128_256, 256
BOUND = 5 * WINDOW * VOCABULARY * 4  # bytes: the engine's text and the reference's, each also while it is made
PROGRAM = """
import json, resource, sys
from lora2serve.cli import run
code = run(sys.argv[1:])
peak = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"code": code, "peak": max(peak)}))
"""


def peak_of(root: Path, vocabulary: int) -> int:
    """Bytes that the largest process of a parity run takes at most, with a model of that vocabulary."""
    root.mkdir()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": WINDOW + 1}
    base = make_model(root / "base", vocab_size=vocabulary, **shape)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / file, base / file)
    lora2serve("export", base, "-t", "vllm", "-o", "made", cwd=root)
    words = [sys.executable, "-c", PROGRAM, "parity", "made/vllm", "--engine", "transformers", "--report", "parity"]
    alone = {**os.environ, fork_client.VARIABLE: fork_client.OFF}  # a fork counts what it shares with its server
    done = subprocess.run(words, cwd=root, check=True, capture_output=True, text=True, env=alone)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0, done.stderr
    report = json.loads((root / "parity" / "report.json").read_text())
    assert report["data"]["window"] == WINDOW
    assert report["data"]["positions"] * VOCABULARY * 4 > BOUND, (
        "the control: all texts at once are more than the bound"
    )
    return int(told["peak"])


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_vocabulary_of_128k(tmp_path: Path) -> None:
    """Of whole processes, each of which loads the libraries by itself; the next test is of the texts alone."""
    small, large = (peak_of(tmp_path / str(size), size) for size in (1536, VOCABULARY))
    print(
        f"{small / 1e9:.2f} GB, and {(large - small) / 1e9:.2f} GB more with {VOCABULARY} tokens (bound {BOUND / 1e9:.2f})"
    )
    assert large - small < BOUND


def test_one_text_at_a_time(tmp_path: Path) -> None:
    """A reference's logits are read back in the room of two texts; all of them, the control, are eight."""
    count, tokens, vocabulary = 8, 65, 16_384
    text = (tokens - 1) * vocabulary * 4  # bytes
    prompts = PromptSet((ScoredText("task", tuple(range(tokens)), ""),) * count, (), (), (), None, vocabulary, tokens)
    with (tmp_path / "logits").open("wb") as file:
        file.truncate(count * text)
    saved, peaks = SavedLogits(tmp_path / "logits", prompts), []
    for read in (lambda: sum(len(reference) for reference, _ in saved.rows()), lambda: len(list(saved.rows()))):
        tracemalloc.start()
        read()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one, whole = peaks
    assert one < 3 * text < 8 * text <= whole
