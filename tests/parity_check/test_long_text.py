"""What is wrong far into a text alone: rope scaling, rope's base and windows; short texts do not show it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora2serve.artifacts.parity_report import ComparisonResult
from lora2serve.data.long_text import TAIL, make_long
from lora2serve.parity_check.comparator import check
from lora2serve.parity_check.comparisons import of_exports
from lora2serve.parity_check.trained_model import of_parts
from lora2serve.progress import Silent
from tests.conftest import lora2serve
from tests.support.runs import DEMO

WINDOW = 300  # of the model's layers
SHORT = 64  # tokens of the other texts
DAMAGES: Mapping[str, Mapping[str, Any]] = {
    "window halved": {"sliding_window": WINDOW // 2},
    "no window": {"sliding_window": None},
    "rope scaled beyond a length": {
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
    "rope's base": {"rope_parameters": {"rope_type": "default", "rope_theta": 10400.0}},
}


def test_what_it_is_made_of() -> None:
    """Its end is its beginning; it fills the context, or as much of it as is wanted."""
    texts = [list(range(10, 90)), list(range(100, 160))]
    whole = make_long(texts, 2048, 512)
    assert whole and whole.whole
    assert len(whole.ids) == 511
    assert whole.tail == TAIL - 1
    assert whole.ids[-whole.tail :] == whole.ids[: whole.tail]
    assert whole.ids[:140] == (*texts[0], *texts[1])
    capped = make_long(texts, 200, 512)
    assert capped and not capped.whole
    assert (len(capped.ids), capped.tail) == (200, 50)
    assert make_long(texts, 0, 512) is None
    assert make_long(texts, 2048, 4) is None


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ComparisonResult]:
    """The demo's base as a model with windows, exported, and damaged copies of the export."""
    folder = tmp_path_factory.mktemp("long")
    base = Path(shutil.copytree(DEMO / "base", folder / "base"))
    config = json.loads((base / "config.json").read_text())
    windows = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}
    (base / "config.json").write_text(json.dumps(config | windows))
    (sound,) = map(Path, lora2serve("export", base, "-t", "vllm", "-o", folder / "out", cwd=folder).split())
    exports = [sound]
    for name, changes in DAMAGES.items():
        exports.append(Path(shutil.copytree(sound, folder / name)))
        config = json.loads((exports[-1] / "config.json").read_text())
        (exports[-1] / "config.json").write_text(json.dumps(config | changes))
    origin = of_parts("base", base, (), folder / "parity")
    settings = replace(origin.settings, tokens=400, window=SHORT, prompts=2, engines=("transformers",), allow=("*",))
    origin = replace(origin, settings=replace(settings, general=str(DEMO / "general.jsonl")))
    whole, *damaged = of_exports(origin, exports)
    report = check(origin, [whole, *(replace(one, path=None) for one in damaged)], progress=Silent())  # equal tensors
    assert (report.data.long, report.data.context) == (511, 512)
    return dict(zip(("sound", *DAMAGES), report.rows, strict=True))


@pytest.mark.engine
def test_the_sound_export_is_met(rows: dict[str, ComparisonResult]) -> None:
    row = rows["sound"]
    assert row.status == "met", row.gate
    far = row.check("long_kl")
    assert far is not None and far.met


@pytest.mark.engine
@pytest.mark.parametrize("name", DAMAGES)
def test_red_far_into_a_text_alone(rows: dict[str, ComparisonResult], name: str) -> None:
    gate = rows[name].gate
    assert gate is not None
    assert [check.name for check in gate.checks if check.met is False] == ["long_kl"], gate
    assert gate.cause.startswith("rope scaling, sliding window or context")
