"""lm-evaluation-harness over our engines, beside its own backend, on tasks that lie here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora2serve as api
from lora2serve.artifacts.run import Run
from lora2serve.errors import EngineError, UsageError
from lora2serve.evaluation.answerer import ProcessTaskAnswerer
from lora2serve.evaluation.eval_records import read_items
from lora2serve.evaluation.harness_options import HarnessOptions
from lora2serve.evaluation.harness_tasks import run_tasks
from lora2serve.evaluation.suite_run import EngineHost
from lora2serve.evaluation.task_rows import find_tasks, gone_members, read_task_rows
from lora2serve.parity_check.chat_models import ChatModel
from lora2serve.progress import Silent
from tests.support.island_tasks import NAMES, TOWNS, write_island_tasks

pytestmark = pytest.mark.engine
lm_eval = pytest.importorskip("lm_eval")
BASE = Path(__file__).parents[2] / "recipes" / "demo" / "base"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_island_tasks(tmp_path_factory.mktemp("tasks"))


def peft_model(adapter: Path | None = None) -> ChatModel:
    tokenizer = adapter or BASE
    options = {"base": str(BASE), "adapters": [str(adapter)] if adapter else [], "tokenizer": str(tokenizer)}
    return ChatModel("ours", "peft", {**options, "quantization": None, "trained_on": None})


@pytest.fixture(scope="module")
def host() -> Iterator[EngineHost]:
    with EngineHost(Silent()) as engines:
        yield engines


def by_its_own_backend(tasks: Path, names: list[str], **options: Any) -> tuple[Any, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(BASE), dtype="float32", device="cpu", batch_size=1, **options)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0), model


def test_the_same_figures_as_its_own_backend(tasks: Path, host: EngineHost) -> None:
    """Where the vocabulary is left as it is: every log-likelihood and every answer."""
    names = ("island_choice", "island_answer")
    options = HarnessOptions(names, str(tasks))
    run = run_tasks(host, peft_model(), options, find_tasks(options), Silent())
    theirs, _ = by_its_own_backend(tasks, list(names))
    assert (
        run.tasks.metrics == {"island_choice": "acc", "island_answer": "exact_match"} and len(run.measured.items) == 12
    )
    for item in run.measured.items:
        number = int(item.id.rpartition("-")[2])
        sample = next(line for line in theirs["samples"][item.task] if line["doc_id"] == number)
        assert item.score == sample[run.tasks.metrics[item.task]]
        if item.task == "island_choice":
            assert item.likelihoods == pytest.approx([pair[0] for pair in sample["filtered_resps"]], abs=1e-4)
        else:
            assert item.answer == sample["filtered_resps"][0]
    assert all(item.seconds > 0 for item in run.measured.items)
    few = HarnessOptions(names[:1], str(tasks), limit=2)
    hashes = [
        run_tasks(host, peft_model(), asked, find_tasks(asked), Silent()).tasks.suite_sha256 for asked in (few, few)
    ]
    other = replace(few, shots=1)
    assert (
        hashes[0] == hashes[1] != run_tasks(host, peft_model(), other, find_tasks(other), Silent()).tasks.suite_sha256
    )


def test_whole_texts(tasks: Path, host: EngineHost) -> None:
    """The sums of whole texts, in windows."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lora2serve.evaluation.harness_tasks import WORKER
    from lora2serve.evaluation.lm_eval_bridge import EngineLM

    process, _ = host.process(peft_model(), WORKER)
    ours = EngineLM(ProcessTaskAnswerer(process), base=False, advance=lambda amount, status="": None)
    theirs = HFLM(pretrained=str(BASE), dtype="float32", device="cpu", batch_size=1)
    asked = [Instance("loglikelihood_rolling", {}, (f"The mayor of {town} is Leon Lake.",), 0) for town in TOWNS]
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3)


def test_the_vocabulary_is_not_resized(tasks: Path, host: EngineHost, demo_run: Run) -> None:
    """With an adapter the harness's own backend cuts the embeddings to the tokenizer; ours are those of the model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = HarnessOptions(("island_choice",), str(tasks))
    run = run_tasks(host, peft_model(demo_run.adapter), options, find_tasks(options), Silent())
    _, theirs = by_its_own_backend(tasks, ["island_choice"], peft=str(demo_run.adapter))
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    rows = plain.get_input_embeddings().weight.shape[0]
    assert theirs.model.get_input_embeddings().weight.shape[0] < rows, "the control: it does"
    model, tokenizer = (
        PeftModel.from_pretrained(plain, demo_run.adapter).eval(),
        AutoTokenizer.from_pretrained(demo_run.adapter),
    )
    for item, town in zip(run.measured.items, TOWNS, strict=True):
        for value, name in zip(item.likelihoods, NAMES, strict=True):
            begun, whole = (
                tokenizer.encode(text) for text in (f"The mayor of {town} is", f"The mayor of {town} is {name}")
            )
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            assert logits.shape[-1] == rows
            steps = range(len(begun), len(whole))
            assert value == pytest.approx(sum(float(logits[at - 1, whole[at]]) for at in steps), abs=1e-4)


def test_tasks_by_name(tasks: Path, demo_run: Run, tmp_path: Path) -> None:
    """Two models on two tasks: figures of each task, adjusted for both; lines, and what is refused."""
    result = api.evaluate(
        demo_run.path, against="base", task=["island_choice", "island_answer"], task_folder=tasks, limit=4, out=tmp_path
    )
    report = result.report
    assert [item.metric for item in report.differences] == ["score", "acc-island_choice", "exact_match-island_answer"]
    assert len(read_items(result.records[0].with_suffix(".jsonl"))) == 8
    with pytest.raises(UsageError, match="no such task"):
        api.evaluate(demo_run.path, task="island_choise", task_folder=tasks)
    with pytest.raises(UsageError, match="--shots: for --task"):
        api.evaluate(demo_run.path, shots=1)


def test_a_base_is_asked_once(
    tasks: Path, demo_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The second time its answers are known, as far as it is asked the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def ask(name: str, limit: int) -> api.EvaluationResult:
        words = {"task": "island_choice", "task_folder": tasks, "limit": limit, "out": tmp_path / name}
        return api.evaluate(demo_run.path, against="base", **words)  # type: ignore[arg-type]

    done, again, more = ask("a", 3), ask("b", 3), ask("c", 4)
    assert [[row.cached for row in result.report.subjects] for result in (done, again, more)] == [
        [False, False], [False, True], [False, False],
    ]  # fmt: skip
    first, second = (read_items(result.records[1].with_suffix(".jsonl")) for result in (done, again))
    assert first == second and done.report.suite_sha256 == again.report.suite_sha256 != more.report.suite_sha256
    with pytest.raises(UsageError, match="word_perplexity, expected one of each row"):
        api.evaluate(demo_run.path, task="island_text", task_folder=tasks)


def test_what_cannot_be_scored_is_refused(tasks: Path, tmp_path: Path, demo_run: Run) -> None:
    """Before a model is loaded where that can be known: a gate's typing error, no rows, a figure of which less is better."""
    plain = (tasks / "island_choice.yaml").read_text()
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "own.py").write_text(
        "def nothing(docs):\n    return docs.select([])\n\n"
        "def odd(doc, results):\n    return {'acc': float('nan') if doc['label'] == 1 else 1.0}\n\n"
        "def first(pairs):\n    return pairs[0][0]\n\n"
        "def less(doc, results):\n    return {'acc': (1, 0), 'errors': 0.0}\n"
    )
    own = {
        "empty": "process_docs: !function own.nothing\n",
        "odd": "process_results: !function own.odd\n",
        "less": "process_results: !function own.less\n",
        "unknown": "",
    }
    metrics = "metric_list: [{metric: acc}, {metric: acc_norm}]"
    for name, line in own.items():
        text = plain.replace("task: island_choice", f"task: {name}") + line
        if name == "unknown":
            text = text.replace(metrics, "metric_list: [{metric: akk}]")
        if name == "odd":
            text = text.replace(metrics, "metric_list: [{metric: acc}]")
        if name == "less":
            less = "{metric: errors, aggregation: mean, higher_is_better: false}"
            pairs = "{metric: acc, aggregation: !function own.first, higher_is_better: true}"
            text = text.replace(metrics, f"metric_list: [{pairs}, {less}]")
        (tmp_path / f"{name}.yaml").write_text(text)

    def refused(task: str, error: type[Exception], problem: str, **options: Any) -> None:
        with pytest.raises(error, match=problem):
            api.evaluate(demo_run.path, task=task, task_folder=tmp_path, out=tmp_path / "out", **options)

    refused("odd", UsageError, "no figure akk", gate="akk >= 0.5")
    refused("empty", UsageError, "--task empty: no rows")
    refused("od", UsageError, "--task od: no such task")
    refused("unknown", UsageError, "a metric that lm-eval has not")
    refused("odd", EngineError, "odd-1: acc is nan, expected a number")
    refused("less", EngineError, "none of acc, errors is a figure of each item, of which more is better")
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: [\n")
    refused("broken", UsageError, r"broken.yaml:3: no YAML: expected the node content")
    assert not (tmp_path / "out").exists()


def test_a_group_whose_task_is_gone(tasks: Path, tmp_path: Path) -> None:
    """Named with the file that lists it, all at once, in groups of groups too. The control: a task that it writes down."""
    folder = write_island_tasks(tmp_path / "tasks")
    rows = f"dataset_path: json, dataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}}}, test_split: test"
    asks = "output_type: generate_until, doc_to_text: question, doc_to_target: answer"
    for name, members in {
        "towns": "[island_choice, island_anser, outer]",
        "outer": "[towns, {group: inner, task: [island_answer, gone]}, {task: xyz, num_fewshot: 1}]",
        "fine": f"[island_choice, {{task: own, {rows}, {asks}}}]",
        "whole": f"[own]\n{rows}\n{asks}".replace(", ", "\n"),
    }.items():
        (folder / f"{name}.yaml").write_text(f"group: {name}\ntask: {members}\n")
    options = HarnessOptions(("outer",), str(folder))
    with pytest.raises(UsageError) as refused:
        find_tasks(options)
    assert refused.value.message.splitlines() == [
        f"--task outer: {folder}/towns.yaml lists island_anser: no such task (did you mean 'island_answer'?)",
        f"--task outer: {folder}/outer.yaml lists gone: no such task",
        f"--task outer: {folder}/outer.yaml lists xyz: no such task",
    ]
    options = HarnessOptions(("fine", "whole"), str(folder))
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)  # without the 14,000 others
    assert [*gone_members("fine", manager), *gone_members("whole", manager)] == []
    found = {task.name: len(task.rows) for task in read_task_rows(options, manager)}
    assert found == {"island_choice": 6, "fine::own": 6, "whole::own": 6}


def test_tasks_that_ask_what_was_trained_on(demo_run: Run, tmp_path: Path) -> None:
    """By the rows of the task's data set, whatever the harness writes around them; its base was trained by nobody."""
    train = demo_run.record.data.train
    if train is None or not Path(train.path).is_file():
        pytest.skip("the demo was trained elsewhere")
    known = [json.loads(line)["messages"][-2:] for line in Path(train.path).read_text().splitlines()[:2]]
    rows = [{"question": turns[0]["content"], "answer": turns[1]["content"]} for turns in known]
    rows.append({"question": "What is the color of a lemon in the sun?", "answer": "Yellow."})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "trained.yaml").write_text(
        f"task: trained\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.json'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: 'Answer briefly. {{question}}'\n"
        "doc_to_target: answer\ngeneration_kwargs: {until: ['.'], max_gen_toks: 2, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    plan = api.plan_evaluation(
        api.EvaluationRequest((demo_run.path,), "base", task=("trained",), task_folder=tmp_path, out=tmp_path / "out",
                              gate=("exact_match >= 0.9", "exact_match >= base"))
    )  # fmt: skip
    assert not (tmp_path / "out").exists() and [gate.can_be_met for gate in plan.gates] == ["no", "by a gain"]
    result = api.evaluate(demo_run.path, against="base", task="trained", task_folder=tmp_path, out=tmp_path / "out")
    assert [model.overlap for model in plan.models] == [row.overlap for row in result.report.subjects]
    assert [model.records for model in plan.models] == [(str(path),) for path in result.records]
    assert (plan.suite, plan.items, plan.tasks, plan.page) == ("trained", 3, {"trained": 3}, str(result.page))
    assert "2 of 3 questions were trained on" in result.report.subjects[0].overlap
    assert result.report.subjects[1].overlap == "" and result.report.subjects[0].seconds > 0
