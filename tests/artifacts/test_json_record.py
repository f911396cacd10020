"""Objects of JSON as dataclasses: what fits, what does not and how that is said, and what is kept on rewriting."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.json_record import JsonRecord, named
from lora2serve.artifacts.manifest import Manifest, ParityVerdict
from lora2serve.artifacts.parity_report import ParityReport
from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import RunRecord
from lora2serve.errors import InputError
from lora2serve.system.small_files import digest

FILES = {"model.safetensors": {"sha256": "ab", "size": 3}}


@dataclass(frozen=True)
class Part(JsonRecord):
    size: int


@dataclass(frozen=True)
class Whole(JsonRecord):
    name: str
    parts: dict[str, Part] = field(default_factory=dict)
    share: float = 0.0
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, str] = (0, "")
    many: tuple[float, ...] = ()
    other: int | str | None = None
    source: str = named("from", "")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "x: [], expected an object"),
        ({}, "x: name: missing"),
        ({"name": None}, "x: name: null, expected text"),
        ({"name": "n", "parts": {"model.safetensors": {"size": "x"}}},
         "x: parts.model.safetensors.size: 'x', expected a whole number"),
        ({"name": "n", "parts": {"p": {"size": True}}}, "x: parts.p.size: true, expected a whole number"),
        ({"name": "n", "parts": {"p": 1}}, "x: parts.p: 1, expected an object"),
        ({"name": "n", "share": "0.5"}, "x: share: '0.5', expected a number"),
        ({"name": "n", "kind": "c"}, "x: kind: 'c', expected one of a, b"),
        ({"name": "n", "pair": [1]}, "x: pair: [1], expected a list of 2"),
        ({"name": "n", "many": [1, "x"]}, "x: many[1]: 'x', expected a number"),
        ({"name": "n", "other": []}, "x: other: [], expected text"),
        ({"name": 1, "share": None}, "x: name: 1, expected text\nx: share: null, expected a number"),
    ],
)  # fmt: skip
def test_bad_keys_are_named_by_their_path(value: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        Whole.from_json(value, "x")
    assert error.value.message == message


def test_what_is_not_known_is_kept() -> None:
    """In its order, at every depth, nulls and all; the control: a value of ours changes, and only that."""
    value = {"later": {"deep": [1, None]}, "other": None, "name": "n", "from": "here",
             "parts": {"p": {"new": 1, "size": 2}}, "share": 1}  # fmt: skip
    record = Whole.from_json(value, "x")
    assert (record.source, record.parts["p"].size, record.share) == ("here", 2, 1)
    assert json.dumps(record.to_json()) == json.dumps(value)
    changed = replace(record, name="m", share=0.0)
    assert json.dumps(changed.to_json()) == json.dumps(value | {"name": "m", "share": 0.0})
    assert record == Whole.from_json(dict(reversed(value.items())), "x") != changed


def test_a_fresh_one_says_what_it_knows() -> None:
    assert Whole("n", parts={"p": Part(1)}).to_json() == {"name": "n", "parts": {"p": {"size": 1}}}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinity_is_text(value: float) -> None:
    """JSON has none; older files have Python's own words for it."""
    text = Whole("n", share=value, many=(value,)).to_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    for content in (text, json.dumps({"name": "n", "share": value})):
        share = Whole.from_text(content, "x").share
        assert share == value or (math.isnan(share) and math.isnan(value))


def test_a_manifest_is_of_something(tmp_path: Path) -> None:
    for value, message in (
        ({"format": 2}, "lora2serve.json: format 2, expected 1"),
        ({"files": {}}, "lora2serve.json: format None, expected 1"),
        ({"format": 1, "target": "vllm"}, "lora2serve.json: files: missing"),
        ({"format": 1, "files": {}}, "lora2serve.json: target: missing"),
        ({"format": 1, "files": {}, "exports": {"a": {"files": {}}}}, "lora2serve.json: exports.a.target: missing"),
    ):
        with pytest.raises(InputError) as error:
            Manifest.from_json(value)
        assert error.value.message == message
    with pytest.raises(InputError, match="not an export of lora2serve"):
        Export.open(tmp_path)
    (tmp_path / "lora2serve.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Export.open(tmp_path)


def test_an_export_is_written_and_opened(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    value = {"format": 1, "target": "vllm", "quant": None, "files": FILES, "later": [1]}
    Manifest.from_json(value).write(tmp_path)
    export = Export.open(tmp_path)
    assert (export.name, export.bytes, export.manifest.unproven()) == ("vllm", 3, "parity was not run")
    assert export.verify() == ["model.safetensors: content changed since the export (sha256 differs)"]
    proven = export.with_parity(ParityVerdict(True))
    assert proven == Export.open(tmp_path) != export
    text = json.loads((tmp_path / "lora2serve.json").read_text())
    assert text.items() >= (value | {"parity": {"met": True}}).items()


LONG = int("9" * 4000)  # as JSON may have it, and no float


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "n", "share": LONG}, "share: 9+[.]{3}, expected a number of 64 bits"),
        ({"name": "n", "parts": {"p": {"size": LONG}}}, "parts.p.size: 9+[.]{3}, expected a whole number of 64 bits"),
        ({"name": "\ud800"}, r"name: '\\ud800', expected Unicode text"),
        ({"name": "n", "later": [{"x": "a\udfff"}]}, r"later\[0\].x: 'a\\udfff', expected Unicode text"),
        ({"name": "n", "parts": {"\ud800": {"size": 1}}}, r"parts: '\\ud800', expected a key of Unicode text"),
        ('{"name": "n", "name": "m"}', "name: given twice"),
        ('{"name": "n", "parts": {"p": {"size": 1, "size": 1}}}', "size: given twice"),
        ('{"name": "n", "later": {"\\u001b": 1, "\\u001b": 1}}', r"'\\x1b': given twice"),
        ('{"name": "n", "later": ' + "[" * 50_000 + "]" * 50_000 + "}", "not JSON (?s:.*)"),
    ],
)  # fmt: skip
def test_values_that_harm_later(value: object, message: str) -> None:
    """They are refused at reading; the control is what comes nearest to each and is taken."""
    with pytest.raises(InputError, match=f"^x: {message}$"):
        Whole.from_text(value if isinstance(value, str) else json.dumps(value), "x")
    taken = {"name": "\U0001f600", "parts": {"é": {"size": 2**63 - 1}}, "share": 10**300, "later": {"name": LONG}}
    assert Whole.from_text(json.dumps(taken), "x").to_json() == taken


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\0b", "\ud800", "x" * 256]
)
def test_a_manifest_names_files_inside(tmp_path: Path, name: str) -> None:
    """Refused before any file is looked at; the control: names with folders, and odd ones that are paths."""
    entry = {"sha256": "ab", "size": 3}
    value = {"format": 1, "target": "vllm", "files": {name: entry}}
    for content, where in (
        (value, "files: "),
        ({"format": 1, "files": {}, "exports": {"a": value}}, r"exports\.a\.files: "),
        ({"format": 1, "target": "adapter", "files": {}, "bundle": [name]}, r"bundle(\[0\])?: "),
    ):
        (tmp_path / "lora2serve.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"lora2serve\.json: {where}'.*, expected .*$") as error:
            Export.open(tmp_path)
        assert "\n" not in error.value.message and error.value.message.isprintable()
    good = value | {"files": dict.fromkeys(("adapter/model.safetensors", "..a", "a b\n", "é/.x", "x" * 255), entry)}
    assert len(Manifest.from_json(good).verify(tmp_path)) == 5


def test_verify_follows_no_link(tmp_path: Path) -> None:
    """Not even that of a folder; the control is the same file in a folder of the export."""
    export, outside = tmp_path / "export", tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"abc")
    (export / "real").mkdir(parents=True)
    (export / "real" / "x").write_bytes(b"abc")
    (export / "linked").symlink_to(outside)
    files = {f"{folder}/x": digest(outside / "x") for folder in ("linked", "real")}
    manifest = Manifest.from_json({"format": 1, "target": "vllm", "files": files})
    assert manifest.verify(export) == ["linked/x: missing", "linked: not part of the export"]


def test_a_run_is_empty_then_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.record == RunRecord()
    run.save(replace(run.record, steps=3))
    (tmp_path / "run.json").write_text('{"steps": 3, "later": 1}')
    run.save(replace(run.record, finished=True))
    assert json.loads((tmp_path / "run.json").read_text()) == {"steps": 3, "later": 1, "finished": True}
    (tmp_path / "run.json").write_text('{"metrics": {"base": {"eval_loss": 1}}}')
    with pytest.raises(InputError, match=r"run\.json: metrics\.base\.perplexity: missing"):
        _ = run.record


def test_a_report_needs_its_rows() -> None:
    with pytest.raises(InputError, match="report: rows: missing"):
        ParityReport.from_json({"format": 1}, "report")
    for figures, message in (
        ({"part": "other"}, r"part: 'other', expected one of task, general"),
        ({"tokens": ["a", "b"]}, "tokens: 2 beside 2 values of kl, expected one more"),
        ({"tokens": ["a"], "kl": []}, "tokens: 1 beside 0 values of kl, expected one more"),
    ):
        good = {"part": "task", "text": "", "kl": [0.1, 0.2], "tokens": ["a", "b", "c"]}
        value = {"format": 1, "rows": [{"export": "vllm", "prompts": [good]}]}
        ParityReport.from_json(value, "report")
        bad = {"format": 1, "rows": [{"export": "vllm", "prompts": [good, good | figures]}]}
        with pytest.raises(InputError, match=rf"^report: rows\[0\]\.prompts\[1\]\.{message}$"):
            ParityReport.from_json(bad, "report")
    with pytest.raises(InputError, match="format 2, expected 1"):
        ParityReport.from_json({"format": 2, "rows": []}, "report")
