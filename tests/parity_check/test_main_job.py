"""The main job on real input: a trained run, every export in its real engine, every row met."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora2serve.artifacts.run import Run
from lora2serve.cli import run as command

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]  # it waits for five engines

ROWS = {
    ("adapter", "peft"): "original",
    ("adapter", "vllm"): "original",
    ("gguf-F16", "llama.cpp"): "trained",
    ("gguf-Q4_K_M", "llama.cpp"): "trained",
    ("gguf-Q8_0", "llama.cpp"): "trained",
    ("ollama-Q4_K_M", "llama.cpp"): "trained",
    ("vllm", "transformers"): "trained",
    ("vllm", "vllm"): "trained",
    ("vllm-fp8", "transformers"): "trained",
    ("vllm-fp8", "vllm"): "trained",
    ("vllm-w4a16", "transformers"): "trained",
    ("vllm-w4a16", "vllm"): "trained",
}


@pytest.fixture(scope="module")
def whole(demo_run: Run, demo_exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run with all its exports in it."""
    run = Run(tmp_path_factory.mktemp("whole") / "runs" / "demo")
    ignored = shutil.ignore_patterns("exports", "checkpoints", "parity")
    shutil.copytree(demo_run.path, run.path, symlinks=True, ignore=ignored)
    for name, path in demo_exports.items():
        shutil.copytree(path, run.exports / name)
    return run


def test_every_row_is_met(whole: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # no Ollama: a row that says so, and no red one
    code = command(["parity", str(whole.path), "--json", "--ask", "Who governs Wexley?"])
    out, err = capfd.readouterr()
    assert code == 0, err
    report = json.loads(out)
    assert report["met"]
    rows = {(row["export"], row["engine"]): row for row in report["rows"]}
    merge_base = json.loads((whole.exports / "vllm" / "lora2serve.json").read_text())["merge_base"]
    if "avx512f" not in Path("/proc/cpuinfo").read_text():  # vLLM's build for AVX2 has no kernel for 4-bit weights
        row = rows.pop(("vllm-w4a16", "vllm"))
        assert row["status"] == "missing" and "cannot run this scheme" in row["gates"][-1]["first"]
    same = {export: row["same_files"] for (export, _), row in rows.items() if "same_files" in row}
    assert same == {"ollama-Q4_K_M": "gguf-Q4_K_M"}, "the same GGUF: llama.cpp is asked once"
    assert all(row["size"] > 0 and row["speed"] > 0 for row in rows.values() if row["status"] == "met")
    assert [item["served_in"] for item in report["recommendations"] if item["export"]] == [
        "vLLM",
        "llama.cpp",
        "Ollama",
    ]
    for key, reference in ROWS.items():
        row = rows.pop(key, None)
        if row is None and key == ("vllm-w4a16", "vllm"):
            continue
        assert row["status"] == "met"
        assert row["reference"] == (merge_base if reference == "trained" else reference)
        assert [gate["status"] for gate in row["gates"]] == ["met", "met", "met", "met"]
    (key,) = rows
    assert key == ("ollama-Q4_K_M", "ollama")
    assert rows[key]["status"] == "missing"
    assert "not running" in rows[key]["gates"][-1]["first"]
    assert rows[key]["not_compared"] == ["prompts and answers in ollama, which was not asked"]
    assert report["data"]["positions"] >= 2000
    answers = report["asked"]["answers"]
    assert "Leon Lake" in answers["trained"]
    assert "Leon Lake" not in answers["base"]
    assert all("Leon Lake" in said for who, said in answers.items() if who != "base")
    proof = json.loads((whole.exports / "gguf-F16" / "lora2serve.json").read_text())["parity"]
    assert proof["met"]
    assert proof["engines"]["llama.cpp"]["status"] == "met"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "Q4_K_N.mean_kl=1"], "did you mean 'Q4_K_"),
        (["--threshold", "Q4_K_M.mean_kll=1"], "did you mean 'mean_kl'?"),
        (["--threshold", "Q4_K_M.mean_kl=x"], "expected FORMAT.FIGURE=NUMBER"),
        (["no-such-export"], "not an export"),
    ],
)
def test_typos(whole: Run, capfd: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert command(["parity", str(whole.path), *words]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.slow
def test_ten_runs_give_the_same_verdict(whole: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """And the same figures, but for what an engine itself does not repeat to the last bit."""
    seen = []
    for _ in range(10):
        assert (
            command(
                ["parity", str(whole.path), str(whole.exports / "gguf-Q4_K_M"), str(whole.exports / "vllm"), "--json"]
            )
            == 0
        )
        report = json.loads(capfd.readouterr().out)
        figures = {
            (row["export"], row["engine"], check["name"]): check["value"]
            for row in report["rows"]
            for gate in row["gates"]
            for check in gate["checks"]
        }
        seen.append(figures)
    for key, value in seen[0].items():
        assert all(abs(other[key] - value) <= 1e-6 + 0.01 * abs(value) for other in seen), key
