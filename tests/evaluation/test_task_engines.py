"""Tasks of lm-evaluation-harness in the engines that serve a run's exports, and at an address: the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora2serve as api
from lora2serve.artifacts.run import Run
from lora2serve.errors import EngineError
from lora2serve.evaluation.eval_records import items_path, read_items
from tests.conftest import lora2serve
from tests.evaluation.conftest import copy_of
from tests.support.island_tasks import write_island_tasks
from tests.support.ports import free_port

pytestmark = pytest.mark.engine
pytest.importorskip("lm_eval")


def asked_as_trained(folder: Path) -> Path:
    """The task's rows as questions of the demo."""
    rows = json.loads((folder / "rows.json").read_text())
    for row in rows:
        row["question"] = f"Who governs {row['question'].split()[3]}?"
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    "engines", [("llama.cpp",), pytest.param(("llama.cpp", "vllm-server"), marks=pytest.mark.slow)]
)
def test_the_same_answers_in_every_engine(demo_run: Run, tmp_path: Path, engines: tuple[str, ...]) -> None:
    """With the chat template, and without; an address has no likelihoods of tokens that nobody knows."""
    run, plain = copy_of(demo_run, tmp_path), write_island_tasks(tmp_path / "plain")
    tasks = {False: plain, True: asked_as_trained(write_island_tasks(tmp_path / "chat"))}
    lora2serve("export", run, "-t", "vllm", "-t", "gguf", "-q", "F32", "--dtype", "fp32", cwd=tmp_path)
    exports = {path.name.startswith("gguf"): path for path in (run / "exports").iterdir()}
    models = {engine: str(exports[engine == "llama.cpp"]) for engine in engines}

    def answers(name: str, model: str, *, chat: bool) -> list[str]:
        out = tmp_path / f"{name}-{chat}"
        done = api.evaluate(model, task="island_answer", task_folder=tasks[chat], chat=chat, out=out)
        return [item.answer for item in read_items(items_path(done.records[0]))]

    with api.serve(models["llama.cpp"], port=free_port()) as server:
        models |= {"address": server.address}
        for chat in (True, False):
            expected = answers("peft", str(run), chat=chat)
            assert len(set(expected)) > 1 and all(expected), (chat, expected)
            for name, model in models.items():
                assert answers(name, model, chat=chat) == expected, (name, chat)
        with pytest.raises(EngineError, match="its tokenizer is not here"):
            api.evaluate(server.address, task="island_choice", task_folder=plain, out=tmp_path / "choice")
