"""The model card: what it tells of each kind of export, and what must not get onto it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora2serve.artifacts.metric_table import METRICS
from lora2serve.artifacts.run import Run
from lora2serve.hub import pull_check, push
from tests.hub.conftest import MET, client_env, export
from tests.support.hub_server import HubServer
from tests.support.manifests import change_manifest

REPO = "user/demo"
SECRET = "a held-out row that is nobody's business"


def card(hub: HubServer, repo: str = REPO) -> str:
    return hub.read(hub.repos[repo].files()["README.md"]).decode()


def metadata(hub: HubServer, repo: str = REPO) -> dict[str, Any]:
    found = yaml.safe_load(card(hub, repo).split("---\n")[1])
    assert isinstance(found, dict)
    return found


def a_run(path: Path, rows: list[dict[str, Any]]) -> Run:
    """A run with a record, a recipe and a parity report, as ``train`` and ``parity`` leave them."""
    (path / "parity").mkdir(parents=True)
    (path / "run.json").write_text(
        json.dumps(
            {
                "name": "demo",
                "steps": 160,
                "quantization": {"type": "nf4", "double_quant": True},
                "data": {"train": {"path": "/home/someone/train.jsonl", "rows": 200}, "eval": {"rows": 20}},
                "metrics": {
                    "base": {"eval_loss": 1.5, "perplexity": 4.5, "tokens": 99},
                    "tuned": {"eval_loss": 0.5, "perplexity": 1.6, "tokens": 99},
                },
            }
        )
    )
    (path / "recipe.yaml").write_text(
        "data: {train: /home/someone/train.jsonl, max_length: 128}\n"
        "train: {batch_size: 8, learning_rate: 0.0002, schedule: cosine, lora: {rank: 16, alpha: 32.0, targets: qv}}\n"
    )
    report = {
        "format": 1,
        "data": {"positions": 2000, "task": 1000, "general": 1000, "conversations": 5, "prompts": 8, "path": "/home/x"},
        "references": {"trained": {"version": "transformers 5.19.0"}},
        "versions": {"torch": "2.13.0"},
        "rows": rows,
    }
    (path / "parity" / "report.json").write_text(json.dumps(report))
    return Run(path)


def a_row(name: str, mean_kl: float) -> dict[str, Any]:
    check = {"name": "mean_kl", "value": mean_kl, "low": 0.00009, "high": 0.0002, "bound": 0.001, "met": True}
    return {
        "export": name, "engine": "vllm", "version": "vllm 0.32.0", "kind": "bfloat16", "reference": "trained",
        "status": "met", "seconds": 3.0,
        "gates": [{"name": "behaviour", "status": "met", "first": SECRET, "cause": "", "checks": [check]}],
        "prompts": [{"part": "task", "text": SECRET, "kl": [0.1]}],
        "answers": [{"prompt": SECRET, "expected": SECRET, "got": SECRET, "parts": -1}],
    }  # fmt: skip


def test_the_report_goes_along_without_its_texts(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path / "runs" / "demo" / "exports", "vllm")
    push([path], repo_id=REPO, run=a_run(tmp_path / "run", [a_row("vllm", 0.0001), a_row("other", 0.5)]))
    there = hub.repos[REPO].files()
    assert "[report](parity/vllm.md)" in card(hub)
    page, figures = (hub.read(there[f"parity/vllm.{kind}"]).decode() for kind in ("md", "json"))
    assert "| Mean KL divergence (nats) | 0.0001 | 9e-05 to 0.0002 | ≤ 0.001 | met |" in page
    assert [row["engine"] for row in json.loads(figures)["rows"]] == ["vllm"]
    for text in (page, figures, card(hub)):
        assert SECRET not in text and "/home/" not in text
    assert pull_check(REPO).unlisted_files == [], "the report is part of the export, and verified like it"
    push([path], repo_id=REPO, run=Run(tmp_path / "run"))
    assert len(hub.repos[REPO].log()) == 2


def test_lower_and_upper_bounds_of_the_published_report(hub: HubServer, tmp_path: Path) -> None:
    """What must be reached at least is not told as an upper bound; missed and met as the gate decided."""
    row = a_row("vllm", 0.0001)
    row["gates"][0]["checks"] += [
        {"name": "top1_but_ties", "value": 1.0, "low": 0.99, "high": 1.0, "bound": 1.0, "met": False},
        {"name": "first_difference", "value": 1.0, "low": 1.0, "high": 1.0, "bound": 1.0, "met": True},
        {"name": "retention", "value": 0.05, "low": 0.04, "high": 0.06, "bound": 0.1, "met": True},
    ]
    push([export(tmp_path, "vllm")], repo_id=REPO, run=a_run(tmp_path / "run", [row]))
    page = hub.read(hub.repos[REPO].files()["parity/vllm.md"]).decode()
    for line in (
        "| Mean KL divergence (nats) | 0.0001 | 9e-05 to 0.0002 | ≤ 0.001 | met |",  # the control: an upper one
        "| Same top token, ties apart | 100.00% | 99.00% to 100.00% | ≥ 100.00% | **missed** |",
        "| First difference excusable | 100% |  | ≥ 100% | met |",
        "| Adapter's signal kept | 95.00% | 94.00% to 96.00% | ≥ 90.00% | met |",
    ):
        assert line in page, page


def test_the_pushed_report_begins_as_the_page_does(hub: HubServer, tmp_path: Path) -> None:
    """Size, speed, units, bounds, what it is judged by, what the figures mean; and that it was the one to ship."""
    row = {
        **a_row("vllm", 0.0001),
        "target": "vllm",
        "size": 2_040_000,
        "speed": 31.4,
        "computed": "computed in float32",
    }
    larger = {**a_row("other", 0.00005), "target": "vllm", "size": 9_000_000}
    push([export(tmp_path, "vllm")], repo_id=REPO, run=a_run(tmp_path / "run", [row, larger]))
    there = hub.repos[REPO].files()
    page, figures = (hub.read(there[f"parity/vllm.{kind}"]).decode() for kind in ("md", "json"))
    first = page[: page.index("## In vllm")]
    for words in (
        "To ship for vLLM: the smallest of the 2 that meet their bounds.",
        "| Export | Engine | Verdict | Size | Mean KL, nats |",
        "| vllm | vllm (computed in float32) | met | 2.0 MB | `0.0001 (≤ 0.001)` |",
        "| 31 | trained model (on its quantized base) |",
        METRICS["mean_kl"].meaning,
        METRICS["retention"].meaning,
    ):
        assert words in first, first
    assert "other" not in page, "the control"
    assert json.loads(figures)["recommended"] == {"vLLM": "the smallest of the 2 that meet their bounds"}
    assert json.loads(figures)["rows"][0]["size"] == 2_040_000


@pytest.mark.parametrize("rows", [[a_row("vllm", 0.0002)], [a_row("other", 0.0001)], []])
def test_a_report_on_something_else_is_not_linked(hub: HubServer, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Its figures are not those of the manifest: the export was made again since, or it is another."""
    push([export(tmp_path, "vllm")], repo_id=REPO, run=a_run(tmp_path / "run", rows))
    assert "](parity/" not in card(hub)
    assert not [name for name in hub.repos[REPO].files() if name.startswith("parity/")]


def test_recipe_and_evaluation(hub: HubServer, tmp_path: Path) -> None:
    push([export(tmp_path, "vllm")], repo_id=REPO, run=a_run(tmp_path / "run", []))
    text = card(hub)
    for line in (
        "| data | train.jsonl, 200 rows |",
        "| LoRA | rank 16, alpha 32, on qv |",
        "| steps | 160 of 8 rows |",
        "| before: the base | 1.5 | 4.5 |",
        "| after, as trained | 0.5 | 1.6 |",
        "| vllm | vLLM | 0.0001 | 99.90% | met |",
    ):
        assert line in text, text
    (index,) = metadata(hub)["model-index"]
    assert {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]} == {
        "loss": 0.5,
        "perplexity": 1.6,
    }


def test_what_each_is_made_from(hub: HubServer, tmp_path: Path) -> None:
    """Quantized forms come from the merged repository of the same push, adapter and merged weights from the base."""
    files = {"config.json": b'{"quantization_config": {}}'}
    paths = [
        export(tmp_path, "gguf", "Q8_0"),
        export(tmp_path, "adapter", seed=1),
        export(tmp_path, "vllm", seed=2),
        export(tmp_path, "vllm", "fp8", seed=3, **files),
    ]
    pushed = push(paths, repo_id=REPO)
    assert [one.repo_id for one in pushed] == [REPO, f"{REPO}-fp8", f"{REPO}-lora", f"{REPO}-GGUF"]
    found = {one.repo_id: metadata(hub, one.repo_id) for one in pushed}
    told = {name.removeprefix(REPO): (data["base_model"], data["base_model_relation"]) for name, data in found.items()}
    assert told == {
        "": ("acme/base-1b", "finetune"),
        "-fp8": (REPO, "quantized"),
        "-lora": ("acme/base-1b", "adapter"),
        "-GGUF": (REPO, "quantized"),
    }
    assert [data["library_name"] for data in found.values()] == ["transformers", "transformers", "peft", "gguf"]
    assert "merged weights, fp8" in card(hub) and "AutoModelForCausalLM" not in card(hub, f"{REPO}-fp8")


def test_without_the_merged_one_the_base_is_named(hub: HubServer, tmp_path: Path) -> None:
    push([export(tmp_path, "vllm", "w4a16")], repo_id=REPO)
    assert metadata(hub, f"{REPO}-w4a16")["base_model"] == "acme/base-1b"


def test_lm_studio_shares_the_file(hub: HubServer, tmp_path: Path) -> None:
    """Its folders are for its own disk: the same GGUF lies in the repository once, where engines look for it."""
    plain = export(tmp_path, "gguf", "Q8_0")
    content = (plain / "demo-Q8_0.gguf").read_bytes()
    made = export(tmp_path, "lmstudio", "Q8_0", content=content)
    push([plain, made], repo_id=REPO)
    there = hub.repos[f"{REPO}-GGUF"].files()
    assert [name for name in there if name.endswith(".gguf")] == ["demo-Q8_0.gguf"]
    checked = pull_check(f"{REPO}-GGUF")
    assert checked.exports == ["gguf-Q8_0", "lmstudio-Q8_0"] and not checked.unlisted_files
    assert "To ship" not in card(hub, f"{REPO}-GGUF"), "one type"


def test_the_card_names_the_smallest_type(hub: HubServer, tmp_path: Path) -> None:
    """Of those that meet their bounds: the control is smaller, and unproven."""
    sizes = {"Q8_0": 9000, "Q4_K_M": 5000, "Q6_K": 7000}
    made = [export(tmp_path, "gguf", quant, content=b"GGUF" + bytes(count)) for quant, count in sizes.items()]
    made.append(export(tmp_path, "gguf", "Q2_K", content=b"GGUF" + bytes(3000), parity=None))
    push(made, repo_id=REPO, allow_unproven=True)
    line = "Ollama and LM Studio: **Q4_K_M** (5.0 kB), the smallest of the 3 types that meet their bounds."
    assert line in card(hub, f"{REPO}-GGUF")


def test_split_files(hub: HubServer, tmp_path: Path) -> None:
    """Ollama does not pull them; llama-cpp-python must be told of the others."""
    names = [f"demo-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    push([export(tmp_path, "gguf", "Q8_0", split={name: b"GGUF" + name.encode() for name in names})], repo_id=REPO)
    text = card(hub, f"{REPO}-GGUF")
    assert f'from_pretrained("user/demo-GGUF", "{names[0]}", additional_files=["{names[1]}"]' in text
    assert "ollama run" not in text and "Ollama does not pull split files" in text


def test_manifest_says_nothing_of_this_machine(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    change_manifest(path, use=f"vllm serve {path}")
    push([path], repo_id=REPO)
    for name, blob in hub.repos[REPO].files().items():
        assert str(tmp_path).encode() not in hub.read(blob), name


def test_the_license_of_the_base(hub: HubServer, tmp_path: Path) -> None:
    """From the base's card on the Hub, where the base does not lie here; its link leads to the base's file."""
    front = b"---\nlicense: other\nlicense_name: acme\nlicense_link: LICENSE\nlanguage: [de]\n---\n# base\n"
    hub.add("acme/base-1b", {"README.md": front, "config.json": b"{}"})
    push([export(tmp_path, "vllm")], repo_id=REPO)
    found = metadata(hub)
    assert (found["license"], found["license_name"], found["language"]) == ("other", "acme", ["de"])
    assert found["license_link"] == f"{hub.url}/acme/base-1b/blob/main/LICENSE"
    push([export(tmp_path / "2", "vllm", LICENSE=b"words")], repo_id=f"{REPO}-2")
    assert metadata(hub, f"{REPO}-2")["license_link"] == "LICENSE"


def test_an_edited_card_is_kept(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    push([path], repo_id="user/demo")
    card = hub.read(hub.repos["user/demo"].files("main")["README.md"]).decode()
    assert "<!-- lora2serve:use -->" in card
    assert "base_model" in card
    own = card.replace("# demo\n", "# My model\n\nWords of my own.\n").replace(
        "## How to run it", "## Edited inside a mark"
    )
    hub.add("user/demo", {"README.md": own.encode()})
    other = export(tmp_path / "second", "vllm", seed=3)
    push([other], repo_id="user/demo")
    after = hub.read(hub.repos["user/demo"].files("main")["README.md"]).decode()
    assert "Words of my own." in after
    assert "## How to run it" in after
    assert "Edited inside a mark" not in after


def test_a_section_fills_when_there_is_something_to_tell(hub: HubServer, tmp_path: Path) -> None:
    """Pushed unproven first, proven later: the parity table comes. A section that the user took out stays out."""
    path = export(tmp_path, "vllm", parity=None)
    push([path], repo_id=REPO, allow_unproven=True)
    assert "## Parity" not in card(hub) and "[!WARNING]" in card(hub)
    without = re.sub(r"<!-- lora2serve:limits -->.*<!-- /lora2serve:limits -->", "", card(hub), flags=re.S)
    hub.add(REPO, {"README.md": without.encode()})
    change_manifest(path, parity=MET)
    push([path], repo_id=REPO)
    assert "| vllm | vLLM | 0.0001 |" in card(hub) and "[!WARNING]" not in card(hub)
    assert "## Limits" not in card(hub)


def test_pictures_and_data_sets(hub: HubServer, tmp_path: Path) -> None:
    """The task is the base's, where the export can do it; of the recipe's data, what is on the Hub is named."""
    hub.add("acme/base-1b", {"README.md": b"---\npipeline_tag: image-text-to-text\n---\n"})
    run = a_run(tmp_path / "run", [])
    run.recipe.write_text("data: {train: org/chats@v1, eval: data/eval.jsonl, split: train}\n")
    blind = export(tmp_path, "gguf", "Q4_0")
    seeing = export(tmp_path, "gguf", "Q8_0", **{"mmproj-demo-f16.gguf": b"GGUF"})
    for number, (path, task) in enumerate([(blind, "text-generation"), (seeing, "image-text-to-text")]):
        push([path], repo_id=f"{REPO}-{number}", run=run)
        found = metadata(hub, f"{REPO}-{number}-GGUF")
        assert (found["pipeline_tag"], found["datasets"]) == (task, ["org/chats"])
    assert "mmproj" not in card(hub, f"{REPO}-1-GGUF").split("## Files")[0], "what is loaded is the model"


@pytest.mark.engine  # starts the Hub's command
def test_an_adapter_as_gguf(hub: HubServer, tmp_path: Path) -> None:
    """The lines that fetch it and write the Modelfile do so, by a shell; the engines themselves are not here."""
    path = export(tmp_path, "gguf-adapter")
    push([path], repo_id=REPO)
    blocks = re.findall(r"```shell\n(.*?)```", card(hub, f"{REPO}-lora-GGUF"), re.S)
    code = "\n".join(line for block in blocks for line in block.splitlines() if line.startswith(("hf ", "printf ")))
    here = tmp_path / "here"
    here.mkdir()
    environment = client_env(hub, tmp_path / "home2", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    subprocess.run(["bash", "-ec", code], cwd=here, env=environment, check=True, capture_output=True)
    assert (here / "demo-lora.gguf").read_bytes() == (path / "demo-lora.gguf").read_bytes()
    assert (here / "Modelfile").read_text() == "FROM ./base.gguf\nADAPTER ./demo-lora.gguf\n"
    assert metadata(hub, f"{REPO}-lora-GGUF")["base_model_relation"] == "adapter"
