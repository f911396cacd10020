"""``parity --dry-run``: what would be compared; it refuses what parity does, asks no engine and leaves nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora2serve
from lora2serve.api.check_parity import run_parity
from lora2serve.artifacts.parity_report import ComparisonResult, ParityReport
from lora2serve.cli import run as command
from lora2serve.config.recipe import ParityRecipe
from lora2serve.errors import Lora2ServeError, UsageError
from lora2serve.parity_check import installed_engines
from lora2serve.parity_check.comparisons import NAMES, of_url
from lora2serve.parity_check.installed_engines import engine_state
from lora2serve.parity_check.parity_plan import of_engines
from lora2serve.parity_check.thresholds import TABLE
from lora2serve.parity_check.trained_model import of_parts
from lora2serve.system import scratch
from tests.support.folders import content
from tests.support.tiny import make_adapter, make_model

URL = "http://localhost:1"
ROWS = '{"prompt": "Who?", "completion": "Nobody."}\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, two exports of it, an adapter without any, rows and an earlier report."""
    root = tmp_path_factory.mktemp("planned")
    make_adapter(root / "mayor", make_model(root / "base"))
    make_adapter(root / "clerk", root / "base", seed=2)
    lora2serve.export(root / "mayor", targets=["adapter", "gguf-adapter"], out=root / "exports/mayor")
    (root / "rows.jsonl").write_text(ROWS * 3)
    (root / "bad.jsonl").write_text("{}\n")
    earlier = ParityReport(rows=(ComparisonResult("adapter", engine="peft"), ComparisonResult("vllm", engine="vllm")))
    (root / "report.json").write_text(earlier.to_text())
    (root / "file").write_text("")
    return root


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def request(**words: Any) -> lora2serve.ParityRequest:
    return lora2serve.ParityRequest(**{"model": "mayor", "data": "rows.jsonl", **words})


def test_what_would_be_compared(here: Path) -> None:
    before = content(here)
    plan = lora2serve.plan_parity(
        request(require=("peft",), thresholds={"lora.top1": 0.9}, url="http://localhost:1", ask="Who?")
    )
    compared = {(item.export, item.engine and item.engine.name): item for item in plan.comparisons}
    assert list(compared) == [
        ("adapter", "peft"), ("adapter", "vllm"), ("gguf-adapter", "llama.cpp"), ("http://localhost:1", "openai"),
    ]  # fmt: skip
    adapter, url = compared[("adapter", "peft")], compared[("http://localhost:1", "openai")]
    assert [item.required for item in plan.comparisons] == [True, False, False, False]
    assert adapter.bounds["mean_kl"] == adapter.bounds["long_kl"] == TABLE["lora"].mean_kl
    assert adapter.bounds["top1"] == 0.9 and adapter.unjudged == {"p999_kl": "needs 10,000 positions"}
    assert "tensor_nmse" in adapter.bounds and "tensor_nmse" not in url.bounds, "a deployment shows no files"
    assert plan.prompts and (plan.prompts.rows, plan.prompts.conversations, plan.prompts.amount.tokens) == (3, 10, 2048)
    assert (plan.page, plan.ask) == ("exports/mayor/parity/report.html", "Who?")
    assert content(here) == before


def test_the_settings_gate_as_in_its_report(here: Path, tmp_path: Path) -> None:
    """Which takes no engine, so that the report is a true one."""
    asked = lora2serve.ParityRequest(model="mayor", gate="settings", report_dir=tmp_path / "report")
    before = content(here)
    plan = lora2serve.plan_parity(asked)
    assert not any(tmp_path.iterdir()) and content(here) == before
    assert lora2serve.plan_parity(replace(asked, report_dir=None)).page == "exports/mayor/parity/settings/report.html"
    result = run_parity(asked)
    rows = [(row.export, row.target, row.kind, tuple(gate.name for gate in row.gates)) for row in result.report.rows]
    assert [(item.export, item.target, item.kind, item.gates) for item in plan.comparisons] == rows
    assert plan.page == str(result.page) and plan.prompts is None and plan.trained_in is None
    assert {(item.engine, item.reference, item.required) for item in plan.comparisons} == {(None, None, False)}
    assert {item.reference for item in lora2serve.plan_parity(request()).comparisons} == {"original"}, "the control"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "maior"}, ""),
        ({"exports": ("base",)}, "not an export"),
        ({"model": "base"}, "base: no exports to compare"),
        ({"model": "clerk", "exports": ("exports/mayor/adapter",)}, "made from another adapter than clerk"),
        ({"engines": ("pefft",)}, "did you mean 'peft'"),
        ({"require": ("ollama",)}, "no export here is compared in it"),
        ({"thresholds": {"Q9.mean_kl": 1.0}}, "unknown format"),
        ({"thresholds": {"lora.mean_kll": 1.0}}, "unknown figure"),
        ({"baseline": "rows.jsonl"}, "not a report.json"),
        ({"report_dir": "file/x"}, "Not a directory"),
        ({"data": "bad.jsonl"}, "bad.jsonl"),
        ({"data": "none.jsonl"}, "none.jsonl"),
        ({"url": "localhost:1"}, ""),
    ],
)
def test_it_refuses_what_parity_does(here: Path, words: dict[str, Any], message: str) -> None:
    before, refused = content(here), []
    for call in (lora2serve.plan_parity, run_parity):
        with pytest.raises(Lora2ServeError) as caught:
            call(request(**words))
        refused.append((type(caught.value), caught.value.message, caught.value.hint))
    assert refused[0] == refused[1] and message in refused[0][1]
    assert content(here) == before


def test_a_home_that_cannot_be_made(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity works there, wherever its report goes."""
    monkeypatch.chdir(tmp_path)
    asked = request(
        model=here / "mayor", exports=(here / "exports/mayor/adapter",), data=here / "rows.jsonl", report_dir="report"
    )
    assert lora2serve.plan_parity(asked).page == "report/report.html", "the control"
    (tmp_path / "exports").write_text("")
    refused = []
    for call in (lora2serve.plan_parity, run_parity):
        with pytest.raises(Lora2ServeError, match="exports/mayor/parity: Not a directory") as caught:
            call(asked)
        refused.append((type(caught.value), caught.value.message, caught.value.hint))
    assert refused[0] == refused[1]
    assert [path.name for path in tmp_path.iterdir()] == ["exports"]


@pytest.mark.parametrize("bound", ["nan", "inf", "-inf"])
def test_a_bound_that_is_no_number(here: Path, bound: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is beyond one of these, or everything."""
    message = f"thresholds['lora.mean_kl']: {bound}, expected a number"
    for words in ([], ["--dry-run"]):
        assert command(["parity", "mayor", "--threshold", f"lora.mean_kl={bound}", *words]) == 2
        out, err = capfd.readouterr()
        assert not out and err.startswith(f"error: {message}")
    with pytest.raises(UsageError, match=re.escape(message)):
        request(thresholds={"lora.mean_kl": float(bound)})
    assert command(["parity", "mayor", "--threshold", "lora.mean_kl=1", "--dry-run"]) == 0, "the control"


def test_no_bound_of_what_is_not_measured(here: Path) -> None:
    """An adapter's signal without an adapter, a long text where none is asked for."""
    bounds = {}
    for name in ("mayor", "base"):
        item = lora2serve.plan_parity(request(model=name, url=URL)).comparisons[-1]
        bounds[name] = set(item.bounds)
    assert bounds["mayor"] - bounds["base"] == {"retention"} and bounds["base"]
    for long, shown in ((0, False), (4096, True)):
        trained = replace(of_parts("mayor", here / "base", (), here), settings=ParityRecipe(long=long))
        (item,) = of_engines(trained, [of_url(trained, URL, None)], None, here).comparisons
        assert ("long_kl" in item.bounds) == shown and "mean_kl" in item.bounds


def test_no_folder_is_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor removed: a true comparison may begin to write into it meanwhile."""

    def made(folder: Path) -> None:
        raise AssertionError(folder)

    monkeypatch.setattr(scratch, "filled", made)
    assert lora2serve.plan_parity(request(report_dir="new/report")).page
    with pytest.raises(AssertionError, match="report"):
        run_parity(request(report_dir="new/report"))


def test_rows_of_the_baseline_that_would_be_missing(here: Path) -> None:
    plan = lora2serve.plan_parity(request(baseline="report.json"))
    assert plan.lost == plan.unmet == ("vllm in vllm: in report.json, and missing now",), "a row less is no parity"
    assert not lora2serve.plan_parity(request()).unmet, "the control"


def test_an_engine_that_is_not_here(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert engine_state("llama.cpp").missing == "", "the control"
    monkeypatch.setattr(installed_engines, "find_spec", lambda name: None if name == "llama_cpp" else object())
    assert command(["parity", "mayor", "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert "no: llama_cpp: not installed; pip install 'lora2serve[gguf]'" in out and "not installed" not in err
    assert "report: exports/mayor/parity/report.html" in out
    assert command(["parity", "mayor", "--dry-run", "--json"]) == 0
    engines = {
        item["engine"]["name"]: item["engine"]["missing"] for item in json.loads(capfd.readouterr().out)["comparisons"]
    }
    assert engines == {"peft": "", "vllm": "", "llama.cpp": "llama_cpp: not installed"}


def test_the_whole_plan_is_on_stdout(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As plain text, where that is no terminal."""
    assert command(["parity", "mayor", "--data", "rows.jsonl", "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"^gguf-adapter +lora +llama\.cpp +yes +no +the trained model", out, re.MULTILINE)
    assert re.search(r"^Adapter's signal kept +≥ 90\.00%$", out, re.MULTILINE) and "3 held-out rows" in out
    assert not set(out) & {"─", "\x1b"} and not err
    assert command(["parity", "mayor", "--gate", "settings", "--dry-run"]) == 0
    assert re.search(r"^gguf-adapter +lora +settings$", capfd.readouterr().out, re.MULTILINE)


def test_it_says_where_parity_cannot_be_met(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the trained model is asked for nothing."""
    words = ["parity", "mayor", "--require", "llama.cpp", "--dry-run"]
    assert command(words) == 0 and "will not be met" not in "".join(capfd.readouterr()), "the control"
    monkeypatch.setattr(installed_engines, "find_spec", lambda name: None if name == "llama_cpp" else object())
    required = "llama.cpp is required and is not here"
    nothing = "no engine of these exports is here, so that nothing would be compared"
    assert command(words) == 3
    out, err = capfd.readouterr()
    assert out.endswith(f"report.html\nparity will not be met: {required}\n")
    assert err == f"error: parity will not be met: {required}\n"
    assert command([*words, "--json"]) == 3
    assert json.loads(capfd.readouterr().out)["unmet"] == [required]
    assert lora2serve.plan_parity(request(engines=("llama.cpp",))).unmet == (nothing,)
    assert not lora2serve.plan_parity(request(engines=("llama.cpp",), url="http://localhost:1")).unmet, "may answer"
    monkeypatch.setattr(installed_engines, "find_spec", lambda name: None if name == "peft" else object())
    assert lora2serve.plan_parity(request()).unmet == ("the trained model needs peft, which is not here",)


def test_every_engine_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """But those that are servers of their own."""
    monkeypatch.setattr(installed_engines, "find_spec", lambda name: None)
    missing = {name: engine_state(name).missing.partition(": not installed")[0] for name in NAMES if name != "ollama"}
    assert missing == {
        "transformers": "torch, transformers", "peft": "torch, transformers, peft", "vllm": "vllm",
        "vllm-server": "vllm", "llama.cpp": "llama_cpp", "openai": "",
    }  # fmt: skip


def test_no_ollama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert "not running: no Ollama answers at http://127.0.0.1:9" in engine_state("ollama").missing


def test_no_engine_is_imported(here: Path) -> None:
    program = (
        "import sys; from lora2serve.cli import run; code = run(['parity', 'mayor', '--dry-run']); "
        "print(code, [name for name in ('torch', 'transformers', 'peft', 'vllm', 'llama_cpp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
