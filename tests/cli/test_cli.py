"""The command line as a user meets it: typos, missing things, exit codes, stdout for results only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora2serve.cli import _as_ours, cli, run
from lora2serve.cli.options import CommandGroup
from tests.support.tiny import make_adapter, make_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("cli")
    base = make_model(root / "base")
    return base, make_adapter(root / "adapter", base)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "Usage"),
        (["--version"], 0, ""),
        (["tain"], 2, "did you mean 'train'?"),
        (["export"], 2, "no --target given"),
        (["export", "-t", "vlm"], 2, "did you mean 'vllm'?"),
        (["export", "-t", "vllm"], 2, "no runs/latest here"),
        (["export", "no-such-dir", "-t", "vllm"], 1, "no-such-dir"),
        (["export", "-t", "vllm", "-q", "Q9"], 2, "--quant Q9: unknown"),
        (["export", "-t", "gguf", "-q", "Q4_KM"], 2, "did you mean 'Q4_K_M'?"),
        (["inspect", "nothing"], 1, "nor is there a local directory nothing"),
        (["parity"], 2, "no runs/latest here"),
        (["serve"], 2, "no runs/latest here"),
        (["serve", "--print"], 2, "no runs/latest here"),
        (["inspect", "runs/latest"], 1, "runs/latest: no such run or directory"),
        (["verify", "runs/latest"], 1, "runs/latest: no such run or directory"),
        (["verify", "~/no-such-run"], 1, "~/no-such-run: no such directory"),
        (["deploy", "k8"], 2, "deploy k8: unknown kind (did you mean 'k8s'?)"),
        (["evaluate", "--task", "", "--gate", "acc >= 0.5"], 2, "'--task': empty, expected one name at least"),
        (["parity", "--require", " , "], 2, "'--require': empty, expected one name at least"),
        (["train", ":abc:"], 2, "recipe ':abc:': no such file"),
        (["train", "."], 2, "recipe '.': a directory, expected a YAML file"),
    ],
)
def test_words_and_codes(here: Path, capfd: pytest.CaptureFixture[str], args: list[str], code: int, said: str) -> None:
    assert run(args) == code
    out, err = capfd.readouterr()
    assert said in err + (out if not args else "")
    assert "Traceback" not in err
    if code:
        assert len([line for line in err.splitlines() if line.startswith(("error", "Error"))]) <= 1


HOSTILE = "a\x1b[2J\u202eb\nkind: export\x9b\r\x00"


def test_inspect_shows_controls_escaped(here: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """In lines, in JSON and in errors; the control is text of any language, which stays as it is."""
    shutil.copytree(pair[1], here / "run" / "adapter")
    for name in (HOSTILE, "crème brûlée 日本\u3000👩\u200d🚀"):
        (here / "run" / "run.json").write_text(json.dumps({"base": {"id": name}, "finished": True}))
        assert run(["inspect", "run"]) == 0
        lines = capfd.readouterr().out
        assert run(["inspect", "run", "--json"]) == 0
        text = capfd.readouterr().out
        assert json.loads(text)["base"] == name
        assert run(["inspect", f"no {name}"]) == 2
        error = capfd.readouterr().err
        if name == HOSTILE:
            assert r"base: a\x1b[2J\u202eb\nkind: export\x9b\r\x00" in lines.splitlines()
            assert r"\u001b[2J\u202eb\nkind: export\u009b\r\u0000" in text
            assert not any(char in lines + text + error for char in HOSTILE if not char.isprintable() and char != "\n")
        else:
            assert f"base: {name}\n" in lines and name in text


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["tain"], 2),
        pytest.param(["inspect", "./nothing"], 1, marks=pytest.mark.engine),
        pytest.param(["--version"], 0, marks=pytest.mark.engine),
    ],
)
def test_stderr_may_be_closed(here: Path, args: list[str], code: int) -> None:
    """The control: with it open, there is a message where the code is not 0."""
    command = [sys.executable, "-m", "lora2serve", *args]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True, check=False
    )
    whole = subprocess.run(command, capture_output=True, text=True, check=False)
    assert closed.returncode == whole.returncode == code
    assert closed.stdout == whole.stdout and bool(whole.stderr) == (code > 0)


def test_a_hidden_command_is_not_proposed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["check"]) == 2
    assert "no such command 'check'" in (err := capfd.readouterr().err) and "pull-check" not in err


COMMANDS = (
    ["export", "-t", "vllm"], ["serve"], ["serve", "--engine", "ollama"], ["deploy", "k8s"], ["parity"],
    ["push", "--repo-id", "you/x"], ["train", "--resume"],
    ["export", "runs/demo-2", "-t", "vllm"], ["export", "demo-2", "-t", "vllm"], ["serve", "runs/demo-2"],
    ["parity", "demo-2"], ["inspect", "runs/latest"], ["verify", "runs/demo-2"], ["train", "demo-2", "--resume"],
)  # fmt: skip


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_run_that_was_cut_off_at_once(here: Path, capfd: pytest.CaptureFixture[str], args: list[str]) -> None:
    (here / "runs" / "demo-2").mkdir(parents=True)
    (here / "runs" / "latest").symlink_to("demo-2")
    assert run(args) == 2
    problem, hint = capfd.readouterr().err.splitlines()
    assert problem.endswith("runs/demo-2: not a finished run (training was cut off before its first checkpoint)")
    assert "name another run" in hint


def test_a_run_that_was_cut_off_later(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = here / "runs" / "demo" / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (here / "runs" / "demo" / "recipe.yaml").touch()
    assert run(["export", "demo", "-t", "vllm"]) == 2
    assert "before its first checkpoint" in capfd.readouterr().err, "cut off while the first one was saved"
    (checkpoint / "trainer_state.json").touch()
    assert run(["export", "demo", "-t", "vllm"]) == 2
    assert "`lora2serve train --resume runs/demo`" in capfd.readouterr().err


def test_help_cuts_no_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "..." not in capfd.readouterr().out.split("Commands:")[1]


def test_export_prints_directories_only(here: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    _, adapter = pair
    assert run(["export", str(adapter), "-t", "vllm", "-o", "out"]) == 0
    out, _ = capfd.readouterr()
    assert [Path(line).name for line in out.splitlines()] == ["vllm"]
    assert run(["export", str(adapter), "-t", "vllm", "-o", "out"]) == 1
    assert "already exists" in capfd.readouterr().err
    assert run(["export", str(adapter), "-t", "vllm", "-o", "out", "--overwrite", "--json"]) == 0
    (export,) = json.loads(capfd.readouterr().out)
    size = sum(file.stat().st_size for file in (here / "out" / "vllm").iterdir() if file.name != "lora2serve.json")
    assert export == {"target": "vllm", "type": None, "size": size, "path": str(here / "out" / "vllm")}


def test_plan_reads_no_weight_and_writes_nothing(
    here: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    _, adapter = pair
    assert run(["export", str(adapter), "-t", "vllm", "-o", "out", "--plan", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["tensors"] == 21
    assert plan["changed"] == 6
    assert plan["disk"] > 200_000
    assert not (here / "out").exists()


def test_combine(here: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    other = make_adapter(here / "other", base, seed=5)
    given = ["--adapter", str(adapter), "--adapter", str(other), "--combine", "ties", "--weights", "0.5,0.7"]
    assert run(["export", *given, "-t", "vllm", "-o", "out"]) == 0
    assert run(["inspect", "out/vllm"]) == 0


def test_inspect_finds_a_flipped_bit(here: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    _, adapter = pair
    assert run(["export", str(adapter), "-t", "vllm", "-o", "out"]) == 0
    file = here / "out" / "vllm" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run(["inspect", "out/vllm"]) == 1
    assert "model.safetensors: content changed since the export" in capfd.readouterr().err


def test_verbose_shows_the_traceback(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["-v", "inspect", "nothing"]) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["inspect", "nothing", "-v"], ["inspect", "--verbose", "nothing"]])
def test_verbose_may_stand_behind_the_command(here: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run(words) == 1
    assert "Traceback" in capfd.readouterr().err


def test_what_the_system_says_is_one_line(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "lora2serve.yaml").mkdir()
    assert run(["init", "--overwrite"]) == 1
    assert capfd.readouterr().err == "error: lora2serve.yaml: Is a directory\n"


def test_options_of_the_adapter_target(here: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    base, _ = pair
    adapter = str(make_adapter(here / "dora", base, use_dora=True, std=0.01))
    words = ["export", adapter, "-t", "adapter", "-o", "out", "--served-base", "org/model"]
    assert run(words) == 1, "the control: DoRA is refused"
    assert "--as-lora-rank R" in capfd.readouterr().err
    assert run([*words, "--as-lora-rank", "64"]) == 0
    config = json.loads((here / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (64, "org/model")
    assert run(["export", adapter, "-t", "vllm", "-o", "out", "--served-base", "org/model"]) == 2
    assert "--served-base: not an option of --target vllm" in capfd.readouterr().err


def test_inspect_and_doctor_are_for_people(
    here: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    assert run(["inspect", str(adapter)]) == 0
    assert run(["inspect", str(base)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "ranks: 4 ×6" in lines
    assert "types: BF16 ×21" in lines
    assert not any("{" in line or "[" in line for line in lines)
    assert run(["doctor"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert run(["doctor", "--json"]) == 0
    findings = json.loads(capfd.readouterr().out)
    assert all(
        finding["name"].isidentifier() and set(finding) == {"name", "label", "value", "fix"} for finding in findings
    )
    assert lines[0].startswith("python ")
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines if "  " in line[1:]}) == 1, "aligned"


def test_inspect_says_whether_vllm_serves_it(
    here: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair

    def multi_lora(path: Path) -> dict[str, Any]:
        assert run(["inspect", str(path), "--json"]) == 0
        facts: dict[str, Any] = json.loads(capfd.readouterr().out)["multi_lora"]
        assert run(["inspect", str(path)]) == 0
        shown = capfd.readouterr().out
        assert ("vLLM serves it as it is" in shown) == facts["servable"]
        assert all(problem["message"] in shown for problem in facts["problems"])
        return facts

    as_it_is = {"servable": True, "problems": [], "missing_base": None}
    assert multi_lora(adapter) == as_it_is
    dora, magnitudes = multi_lora(make_adapter(here / "dora", base, use_dora=True))["problems"]
    assert dora["rule"] == "dora" and dora["message"].startswith("DoRA rescales")
    assert "--as-lora-rank" in dora["way_out"]
    assert magnitudes["rule"] == "tensors" and magnitudes["message"].startswith("no LoRA weights")
    gone = Path(shutil.copytree(adapter, here / "gone"))
    config = json.loads((gone / "adapter_config.json").read_text())
    for name in ("org/nowhere", "/nowhere/at all"):
        (gone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        assert multi_lora(gone) == {**as_it_is, "missing_base": name}
    assert run(["export", str(adapter), "-t", "adapter", "-o", "out"]) == 0
    capfd.readouterr()
    assert multi_lora(here / "out" / "adapter") == as_it_is


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "-t", "vllm", "--dtype", "bf17"), "--dtype bf17: unknown (did you mean 'bf16'?)"),
        (("serve", "--engine", "vlm"), "--engine vlm: unknown (did you mean 'vllm'?)"),
        (("export", "-t", "vllm", "--merge-base", "x"), "--merge-base x: unknown"),
        (("serve", "--engine", "VLLM"), "--engine VLLM: unknown (did you mean 'vllm'?)"),
    ],
)
def test_a_mistyped_word(words: Sequence[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In the words of every other error; click's own are the control."""
    assert run(words) == 2
    err = capfd.readouterr().err
    assert err.splitlines()[0] == f"error: {said}" and "hint: known: " in err
    assert run(["serve", "--port", "x"]) == 2
    assert "Invalid value for '--port'" in capfd.readouterr().err


@pytest.mark.parametrize("group", ["registry", "adapters"])
def test_a_group_shows_an_example_of_each(group: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([group, "--help"]) == 0
    shown = capfd.readouterr().out.partition("Examples:")[2]
    inside = cli.commands[group]
    assert isinstance(inside, CommandGroup) and inside.commands
    assert [name for name in inside.commands if f"lora2serve {group} {name}" not in shown] == []


def test_what_comes_after_an_export(pair: tuple[Path, Path], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Parity, of all that was made; for an adapter in GGUF also where the base's GGUF comes from."""
    base, adapter = pair
    words = ["export", str(adapter), "-t", "vllm", "-t", "gguf-adapter", "-o", "out"]
    assert run(words) == 0
    err = capfd.readouterr().err
    assert f"next: `lora2serve parity {here}/out/vllm {here}/out/gguf-adapter`" in err
    assert f"BASE.gguf: `lora2serve export {base} --target gguf` makes it" in err
    for word in ("--dry-run", "--plan"):
        assert run([*words, word]) == 1
        assert f"{here}/out/vllm: already exists" in capfd.readouterr().err
    assert run([*words[:-1], "other", "--dry-run", "--json"]) == 0
    planned = json.loads(capfd.readouterr().out)["outputs"]
    sizes = {Path(name).name: output["bytes"] for name, output in planned.items()}
    assert sizes["gguf-adapter"] == next((here / "out" / "gguf-adapter").glob("*.gguf")).stat().st_size


def test_paths_are_shown_without_detours(
    here: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where a link is on the way: its parent is that of what it points to."""
    _, adapter = pair
    (here / "there" / "deep").mkdir(parents=True)
    (here / "link").symlink_to("there/deep")
    assert run(["export", str(adapter), "-t", "vllm", "-o", "link/.././/out", "--dry-run", "--json"]) == 0
    assert list(json.loads(capfd.readouterr().out)["outputs"]) == [f"{here}/there/out/vllm"]
    assert run(["export", str(adapter), "-t", "vllm", "-o", "link/.././/out"]) == 0
    assert capfd.readouterr().out == f"{here}/there/out/vllm\n"
    assert run(["verify", "link/../out/vllm", "--allow-unproven"]) == 0
    assert capfd.readouterr().out == f"{here}/there/out/vllm\n"


def test_inspect_of_a_run_that_was_cut_off(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What it is, how far it came, and how it goes on; a finished one and an empty folder are the controls."""
    run_dir = here / "runs" / "mine"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text("model: {path: org/base}\ndata: {train: x.jsonl}\n")
    assert run(["inspect", "mine"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "kind: unfinished run", "base: org/base", "last checkpoint: none: train again"
    ]  # fmt: skip
    for step in (5, 10):
        state = run_dir / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json"
        state.parent.mkdir()
        state.write_text(json.dumps({"global_step": step, "max_steps": 40}))
    assert run(["inspect", "runs/mine", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["kind"], facts["checkpoint_step"], facts["steps"]) == ("unfinished_run", 10, 40)
    assert facts["resume"] == "lora2serve train --resume runs/mine"
    (run_dir / "adapter").mkdir()
    for name in ("run.json", "adapter/adapter_config.json"):
        (run_dir / name).write_text("{}")
    assert run(["inspect", "mine"]) == 1
    assert "unfinished" not in capfd.readouterr().out


def test_a_library_that_cannot_be_loaded() -> None:
    """Where a part of it does not import, transformers names no module: its cause is told. The control: one that is missing."""
    broken = ModuleNotFoundError("Could not import module 'AutoTokenizer'")
    broken.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    assert str(_as_ours(broken)) == "RuntimeError: operator torchvision::nms does not exist"
    broken.__cause__ = ImportError("libfoo.so: no such file")
    damaged = _as_ours(broken)
    assert str(damaged) == "a library cannot be loaded: libfoo.so: no such file" and "[train]" in damaged.hint
    missing = _as_ours(ModuleNotFoundError("No module named 'optuna'", name="optuna"))
    assert str(missing) == "optuna is not installed" and "[sweep]" in missing.hint
