"""Answers with the export's own penalties, stops and length, in llama.cpp as in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora2serve.parity_check import own_sampling
from lora2serve.parity_check.engines.llama_cpp_engine import LlamaCpp
from lora2serve.parity_check.engines.transformers_engine import Transformers
from tests.conftest import lora2serve
from tests.support.runs import DEMO

pytestmark = pytest.mark.engine

PENALTY = 1.5
LENGTH = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, which repeats itself, with a repetition penalty."""
    path = Path(shutil.copytree(DEMO / "base", tmp_path_factory.mktemp("penalty") / "base"))
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**generation, "repetition_penalty": PENALTY}))
    return path


@pytest.fixture(scope="module")
def exports(base: Path) -> tuple[Path, Path]:
    """A GGUF, and one for Ollama."""
    words = ("-t", "gguf", "-t", "ollama", "-q", "F32", "-o", base.parent / "out")
    gguf, ollama = map(Path, lora2serve("export", base, *words, cwd=base.parent).split())
    return next(gguf.glob("*.gguf")), ollama


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of all lengths, also beyond the 64 tokens that llama.cpp looks at where nothing is said."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    text = "\n".join(json.loads(line)["text"] for line in (DEMO / "general.jsonl").read_text().splitlines()[:40])
    ids = list(tokenizer(text)["input_ids"])
    return [ids[start : start + length] for start, length in ((0, 20), (100, 60), (300, 180), (500, 300))]


def test_the_penalty_is_as_in_transformers(base: Path, exports: tuple[Path, Path], prompts: list[list[int]]) -> None:
    expected = Transformers(str(base)).generate(prompts, LENGTH)
    assert LlamaCpp(str(exports[0]), 512).generate(prompts, LENGTH) == expected
    modelfile = exports[1] / "Modelfile"
    assert LlamaCpp(str(exports[0]), 512, modelfile=str(modelfile)).generate(prompts, LENGTH) == expected


def test_without_it_answers_are_others(exports: tuple[Path, Path], prompts: list[list[int]], tmp_path: Path) -> None:
    """The controls: no penalty, and one that sees less of the context."""
    whole = LlamaCpp(str(exports[0]), 512).generate(prompts, LENGTH)
    text = (exports[1] / "Modelfile").read_text()
    for line in ("repeat_penalty", "repeat_last_n"):
        other = tmp_path / line
        other.write_text("".join(each for each in text.splitlines(True) if line not in each))
        assert LlamaCpp(str(exports[0]), 512, modelfile=str(other)).generate(prompts, LENGTH) != whole


def test_where_the_modelfile_matters(exports: tuple[Path, Path], tmp_path: Path) -> None:
    """Where it sets what the GGUF does, the engine is asked once for both."""
    text = (exports[1] / "Modelfile").read_text()
    assert not own_sampling.differ(exports[1] / "Modelfile", exports[0])
    for setting in ("num_predict 3", 'stop "\n\n"', "presence_penalty 0.5", "repeat_penalty 1.2"):
        other = tmp_path / "Modelfile"
        kept = [line for line in text.splitlines() if setting.split()[0] not in line or "stop" in line]
        other.write_text("\n".join([*kept, f"PARAMETER {setting}", ""]))
        assert own_sampling.differ(other, exports[0]), setting


def test_length_and_stops(exports: tuple[Path, Path], prompts: list[list[int]], tmp_path: Path) -> None:
    text = (exports[1] / "Modelfile").read_text()
    engine = LlamaCpp(str(exports[0]), 512, modelfile=str(exports[1] / "Modelfile"))
    (answer,) = engine.generate(prompts[:1], LENGTH)
    word = engine.llm.detokenize(answer[4:6]).decode()
    for setting, length in (("num_predict 3", 3), (f'stop "{word}"', None)):
        other = tmp_path / "Modelfile"
        other.write_text(f"{text}PARAMETER {setting}\n")
        (shorter,) = LlamaCpp(str(exports[0]), 512, modelfile=str(other)).generate(prompts[:1], LENGTH)
        assert shorter == answer[: len(shorter)]
        assert len(shorter) == length if length else len(shorter) < 6
