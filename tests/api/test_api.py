"""The public API: light to import, whatever was imported before; typed; errors are ours; silent in programs."""

from __future__ import annotations

import inspect
import json
import pydoc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import pytest

import lora2serve
from lora2serve.errors import UsageError
from tests.support.tiny import make_adapter, make_model

PLANS = ("plan_comparison", "plan_evaluation", "plan_export", "plan_parity")
FUNCTIONS = ("train", "export", "parity", "push", "verify", "serve", "deploy", "inspect", "init", *PLANS)
ORDERS = (
    "import lora2serve.exporting.stream, lora2serve.training.advice, lora2serve.parity_check.gates, lora2serve.hub",
    "import lora2serve.serving.server, lora2serve.api.export_model, lora2serve.cli",
    "lora2serve.export, lora2serve.push",
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("api")
    return make_adapter(root / "mayor", make_model(root / "base"))


@pytest.mark.engine  # processes that load all of it
@pytest.mark.parametrize("order", [ORDERS, ORDERS[::-1]])
def test_functions_are_functions_whatever_was_imported(order: Sequence[str]) -> None:
    imports = "\n".join(order)
    program = f"import lora2serve\n{imports}\nprint([callable(getattr(lora2serve, n)) for n in {FUNCTIONS!r}])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([True] * len(FUNCTIONS))


def test_every_name_is_there_and_no_other() -> None:
    assert sorted(lora2serve.__all__) == lora2serve.__all__
    assert all(getattr(lora2serve, name) for name in lora2serve.__all__)
    assert [name for name in dir(lora2serve) if not name.startswith("__")] == lora2serve.__all__
    with pytest.raises(AttributeError, match="has no attribute 'exprot'"):
        _ = lora2serve.exprot  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_typed_and_explained(name: str) -> None:
    function = getattr(lora2serve, name)
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function)
    assert set(parameters) | {"return"} == set(hints)
    assert function.__doc__
    if name not in ("init", "deploy", *PLANS):
        assert "Raises" in function.__doc__
        assert [word for word in parameters if word not in function.__doc__] == []


def test_help_shows_signature_types_and_errors() -> None:
    shown = pydoc.plain(pydoc.render_doc(lora2serve.export))  # what help() prints
    for words in ("targets: 'str | Sequence[str]'", "-> 'list[Export]'", "Raises UsageError", "ExportError"):
        assert words in shown


def test_export_verify_inspect(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exports = lora2serve.export(adapter, targets=["vllm", "adapter"])
    assert [export.path for export in exports] == [tmp_path / "exports/mayor/vllm", tmp_path / "exports/mayor/adapter"]
    assert json.loads((exports[0].path / "lora2serve.json").read_text())["target"] == exports[0].target == "vllm"
    verified = lora2serve.verify(exports[0].path, allow_unproven=True)
    assert verified.bytes == exports[0].bytes and verified.unproven == {"vllm": "parity was not run"}
    facts = lora2serve.inspect(adapter)
    assert facts.kind == "adapter" and facts.multi_lora.servable
    assert capfd.readouterr() == ("", ""), "a program is not spoken to"


def test_failures_are_ours(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call, words in (
        (lambda: lora2serve.export(adapter, targets="vlm"), "did you mean 'vllm'"),
        (lambda: lora2serve.export(adapter, targets="vllm", dtype="int3"), "dtype: 'int3', expected one of bf16"),  # type: ignore[arg-type]
        (lambda: lora2serve.export(adapter, targets=5), "targets: 5, expected a text or a list"),  # type: ignore[arg-type]
        (lambda: lora2serve.export(adapter, targets="gguf", quants=3), "quants: 3, expected a text or a list"),  # type: ignore[arg-type]
        (lambda: lora2serve.export(adapter, targets=["vllm", 5]), "targets.1.: 5, expected a text"),  # type: ignore[list-item]
        (lambda: lora2serve.export(targets="vllm"), "no runs/latest here"),
        (lora2serve.parity, "no runs/latest here"),
        (lambda: lora2serve.serve(adapter), "not an export of lora2serve"),
        (lambda: lora2serve.deploy("nomad", adapter), "kind: 'nomad', expected one of compose"),  # type: ignore[arg-type]
        (lambda: lora2serve.train("demmo"), "did you mean 'demo'"),
        (lambda: lora2serve.train("demo", overrides={"train.lora.rank": 0}), "train.lora.rank: 0"),
        (lambda: lora2serve.inspect(tmp_path), "not a run, export, adapter or model"),
        (lambda: lora2serve.push([adapter], repo_id="you/x"), "not an export of lora2serve"),
    ):
        with pytest.raises(lora2serve.Lora2ServeError, match=words):
            call()
    assert list(tmp_path.iterdir()) == []


def test_the_message_is_without_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lora2serve.Lora2ServeError) as caught:
        lora2serve.export(targets="vllm")
    assert str(caught.value) == caught.value.message and caught.value.hint


def test_progress_is_the_callers(adapter: Path, tmp_path: Path) -> None:
    from contextlib import AbstractContextManager, nullcontext

    from lora2serve.progress import Advance, Unit

    labels: list[str] = []

    class Log:
        def note(self, text: str) -> None: ...

        def warn(self, text: str) -> None: ...

        def track(self, label: str, total: int, unit: Unit = "") -> AbstractContextManager[Advance]:
            labels.append(label)
            return nullcontext(lambda amount, status="": None)

    lora2serve.export(adapter, targets="vllm", out=tmp_path, progress=Log())
    assert labels == ["export"]


def test_ctrl_c_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora2serve.merge.merged import Merged

    def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Merged, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora2serve.export(adapter, targets="vllm", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"overwrite": "no"}, "overwrite: 'no', expected True or False"),
     ({"allow_pickle": 1}, "allow_pickle: 1, expected True or False"),
     ({"as_lora_rank": "8"}, "as_lora_rank: '8', expected a whole number"),
     ({"as_lora_rank": 0}, "as_lora_rank: 0, expected a whole number from 1 on"),
     ({"name": 5}, "name: 5, expected a text"),
     ({"combine": "linear", "weights": "ab"}, "weights: 'ab', expected a list of numbers"),
     ({"density": "x"}, "density: 'x', expected a number"),
     ({"weights": (1, 2)}, "--weights: only with --combine")],
)  # fmt: skip
def test_arguments_of_another_type(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], message: str
) -> None:
    """A text is true: "no" replaced an export."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        lora2serve.export(adapter, targets="adapter", **arguments)  # type: ignore[arg-type]
    assert caught.value.message == message and not list(tmp_path.iterdir())
