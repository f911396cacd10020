"""The report's files, and the page in a real browser."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import fields, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from jsonschema import Draft202012Validator

from lora2serve.api.check_parity import ParityResult
from lora2serve.artifacts.metric_table import METRICS
from lora2serve.artifacts.parity_report import (
    ON_FULL_PRECISION,
    ComparisonResult,
    Gate,
    GreedyAnswer,
    Metric,
    ParityReport,
    PromptFigures,
    Question,
    ReferenceInfo,
    ScoredData,
    TensorError,
)
from lora2serve.cli.parity import show
from lora2serve.errors import InputError
from lora2serve.parity_check import baseline
from lora2serve.parity_check.report import writers
from lora2serve.parity_check.report.charts import by_position, by_text, heat
from lora2serve.parity_check.report.html_page import verdict
from tests.support.browser import look, needs_browser

TEXT = 'a <b>text</b> & "more" \x00 ]]>'


def row(export: str = "gguf-Q8_0", value: float = 1e-3, status: str = "met") -> ComparisonResult:
    checks = (
        Metric("mean_kl", value, value * 0.9, value * 1.1, 4e-3, value * 1.1 <= 4e-3),
        Metric("top1", 0.99, 0.98, 0.995, 0.9, True),
        Metric("equal_answers", 0.5, 0.5, 0.5),
        Metric("retention", 0.01, 0.005, 0.02, 0.1, True),
    )
    bad = status != "met"
    gates = (
        Gate("tokens", "met", (Metric("equal prompts", 3),)),
        Gate("tensors", "met", (Metric("tensor_nmse", 3e-5, 3e-5, 3e-5, 1e-4, True),)),
        Gate("behaviour", status, checks, TEXT if bad else "", "scale: because" if bad else ""),  # type: ignore[arg-type]
    )
    words = ("a", " <b>", " text", "\n")
    prompts = tuple(
        PromptFigures("task" if n % 2 else "general", f"{TEXT} {n}", (value, value * n + 1e-12, 1e-7), words)
        for n in range(1, 5)
    )
    answers = (GreedyAnswer("Who?", "It is Ann.", "It is Bob.", 2), GreedyAnswer("What?", "A hat.", "A hat.", -1))
    tensors = (TensorError("blk.0.attn_q.weight", 3e-5, 1e-4, 0.001, math.inf),)
    return ComparisonResult(
        export, "gguf", "Q8_0", "llama.cpp", "llama-cpp-python 0", "trained", gates,
        beside={"original": checks}, prompts=prompts, answers=answers, tensors=tensors, reply="hello", seconds=1.5,
    )  # fmt: skip


def whole(name: str = "demo") -> ParityReport:
    """A report with all that the first screen shows: sizes, notes, a row for each verdict."""
    small = replace(
        row("gguf-Q4_K_M", 1e-3), size=2_040_000, speed=312.0, computed="computed in float32, served in bfloat16"
    )
    twin = replace(small, export=f"{name}-ollama", target="ollama", same_files="gguf-Q4_K_M")
    missing = Gate("tokens", "missing", (), "vllm: not installed", "pip install 'lora2serve[vllm]'")
    unasked = replace(row("vllm"), target="vllm", engine="vllm", gates=(missing,), required=False, size=9, prompts=())
    adapter = replace(
        row("adapter"), target="adapter", engine="peft", reference="original", size=9, base_size=5_000_000
    )
    return replace(report(small, twin, unasked, adapter, replace(row("b" * 90, 0.1, "missed"), size=10)), run=name)


def report(*rows: ComparisonResult) -> ParityReport:
    reference = ReferenceInfo("peft 0", 320)
    return ParityReport(
        run="demo",
        data=ScoredData(positions=12, requested=2048, task=8, general=4, sequences=4, conversations=3, prompts=2),
        references={"trained": reference, "original": reference},
        versions={"torch": "2"},
        question=Question("Who governs <Wexley>?", {"base": "Ann", "trained": "Bob"}),
        rows=rows,
    )


def regressions(now: ParityReport, earlier: Path) -> tuple[str, ...]:
    return baseline.regressions(now, baseline.read_baseline(earlier), str(earlier))


class Tags(HTMLParser):
    """Every tag that is opened is closed, and nothing is fetched."""

    VOID = ("meta", "link", "br", "hr", "path")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_files(tmp_path: Path) -> None:
    made = report(row(), row("vllm", 0.1, "missed"))
    page = writers.write(made, tmp_path / "parity")
    assert {path.name for path in page.parent.iterdir()} == {"report.json", "report.html", "report.xml", "summary.md"}
    content = json.loads((page.parent / "report.json").read_text())
    assert (content["format"], content["met"]) == (1, False)
    assert [one["status"] for one in content["rows"]] == ["met", "missed"]
    suites = ElementTree.parse(page.parent / "report.xml").getroot()
    assert [(suite.get("name"), suite.get("tests"), suite.get("failures")) for suite in suites] == [
        ("gguf-Q8_0.llama.cpp", "3", "0"),
        ("vllm.llama.cpp", "3", "1"),
    ]
    summary = (page.parent / "summary.md").read_text()
    assert "| vllm | llama.cpp | ❌ missed |" in summary
    assert "scale: because" in summary


def test_one_that_cannot_be_written_leaves_no_half(tmp_path: Path) -> None:
    """Nor a hidden file; what was written before it is whole."""
    (tmp_path / "summary.md").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        writers.write(report(row()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.xml", "summary.md"}


@cache
def validator() -> Draft202012Validator:
    schema = json.loads((Path(writers.__file__).parent / "report.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def schema_errors(content: object) -> list[str]:
    return [error.message for error in validator().iter_errors(content)]


def test_schema(tmp_path: Path) -> None:
    """Every report is of the shipped schema; the controls are not."""
    made = replace(report(row(), row("vllm", math.inf, "missed")), regressions=("worse",))
    content = json.loads(writers.write(made, tmp_path).with_name("report.json").read_text())
    assert not schema_errors(content)
    for change in ({"format": 2}, {"rows": []}, {"met": "yes"}, {"references": {"other": {}}}):
        assert schema_errors({**content, **change}), change
    del content["rows"][0]["gates"][0]["cause"]
    assert schema_errors(content)


def test_schema_and_types_agree() -> None:
    """Every key of the schema is a field, and every field a key; a report of version 0.1.0 is of the schema, too."""
    schema = json.loads((Path(writers.__file__).parent / "report.schema.json").read_text())
    answer, prompt = (schema["$defs"]["row"]["properties"][key] for key in ("answers", "prompts"))
    pairs = {
        ParityReport: schema,
        ScoredData: schema["properties"]["data"],
        ReferenceInfo: schema["properties"]["references"]["additionalProperties"],
        Question: schema["properties"]["asked"],
        ComparisonResult: schema["$defs"]["row"],
        Gate: schema["$defs"]["gate"],
        Metric: schema["$defs"]["check"],
        GreedyAnswer: answer["items"],
        PromptFigures: prompt["items"],
        TensorError: schema["$defs"]["row"]["properties"]["tensors"]["items"],
    }
    for kind, described in pairs.items():
        names = {
            spec.metadata.get("key", spec.name) for spec in fields(kind) if spec.name not in ("unknown", "key_order")
        }
        assert names | {*kind.COMPUTED} == described["properties"].keys(), kind
    old = json.loads((Path(__file__).parents[1] / "artifacts" / "samples" / "report.json").read_text())
    assert not schema_errors(old)
    del old["rows"][0]["gates"][0]["checks"][0]["bound"]
    assert schema_errors(old), "the control"


def test_page_is_whole_and_alone(tmp_path: Path) -> None:
    text = writers.write(report(row(), row("vllm", 0.1, "missed")), tmp_path).read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert all(link.startswith(("#", "data:")) for link in tags.links)
    assert "<b>text</b>" not in text
    assert "<mark>Bob.</mark>" in text


def test_names_are_no_markup_on_the_page(tmp_path: Path) -> None:
    """A directory's name, a question and what an engine answered are from anywhere."""
    hostile = "<img src=x onerror=alert(1)>'\"&"
    made = whole(hostile)
    made = replace(
        made, question=Question(hostile, {hostile: hostile, made.rows[1].title: hostile, "trained": hostile})
    )
    tags = Tags()
    tags.feed(writers.write(made, tmp_path).read_text())
    assert not tags.open and "img" not in tags.names and tags.names.count("script") == 0
    assert made.rows[1].export.startswith("<img") and made.recommendations[1].export == made.rows[1].export
    assert {"table", "a"} <= {*tags.names}, "the control"


def test_the_first_screen_says_what_to_ship_and_why(tmp_path: Path) -> None:
    """The page and the summary: what to ship, each figure's unit and bound, what the figures mean, by what it is judged."""
    page = writers.write(whole(), tmp_path)
    text, summary = page.read_text(), page.with_name("summary.md").read_text()
    first = text[: text.index("<section")]
    for words in (
        "Ship for llama.cpp", "gguf-Q4_K_M", "2.0 MB", "The only one of 2 that meets its bounds.", "Mean KL, nats",
        "≤ 0.004", "312", "computed in float32, served in bfloat16", "same files as gguf-Q4_K_M: asked once",
        "on its quantized base", "+ 5.0 MB base", "not measured", METRICS["mean_kl"].meaning.replace("'", "&#39;"),
        METRICS["retention"].meaning,
    ):  # fmt: skip
        assert words in first, words
        assert html.unescape(words) in summary, words


def test_the_whole_report_in_a_sentence() -> None:
    assert verdict(report(row())) == "Each export answers like the trained model, within the bounds of its format."
    assert verdict(whole()).startswith(f"1 of 5 comparisons is not met: {'b' * 90} in llama.cpp: scale: because.")
    assert "worse than the baseline" in verdict(replace(report(row()), regressions=("x",)))
    met, _, missing, *_ = whole().rows
    assert verdict(report(met, missing)).endswith("1 of 2 comparisons was not made: the engine is not here.")
    assert verdict(report(missing)) == "Nothing was compared: no engine of these exports is installed here."
    alone = replace(met, engine="", gates=(Gate("settings", "met"),))
    assert verdict(report(alone)).endswith("no engine asked: all is as planned.")


def test_the_terminal_ends_with_what_to_ship(capfd: pytest.CaptureFixture[str]) -> None:
    made = whole()
    show(ParityResult(made, Path("report.html"), ()))
    out, err = capfd.readouterr()
    assert out == "" and "2.0 MB" in err and "312" in err
    lines = [line for line in err.splitlines() if not line.startswith("  ")][-len(made.recommendations) :]
    assert [line.partition(":")[0] for line in lines] == [item.title for item in made.recommendations]
    assert lines[0] == "Ship for llama.cpp: gguf-Q4_K_M (2.0 MB), the only one of 2 that meets its bounds."
    assert "  Mean KL 0.001 nats, 99.00% same top token" in err


def test_the_answer_of_the_own_reference(tmp_path: Path) -> None:
    """An adapter is judged by the model on the full-precision base, a folded export by the one on the quantized base."""
    made = whole()
    answers = {"trained": "Ann", ON_FULL_PRECISION: "Bob", made.rows[0].title: "Ann", made.rows[3].title: "Ann"}
    text = writers.write(replace(made, question=Question("Who?", answers)), tmp_path).read_text()
    asked = re.findall(r"<tr><td>([^<]*)</td><td>Ann(?:<small>(.*?)</small>)?</td>", text)
    assert dict(asked) == {
        "trained": "",
        "gguf-Q4_K_M in llama.cpp": '<span class="ok">the same</span> as the trained model on its quantized base',
        "adapter in peft": "the trained model on the full-precision base: Bob",
    }
    assert Question("Who?", {"trained": "Ann"}).expected("original") == "Ann", "there was one reference"


def test_a_perfect_text_has_no_color() -> None:
    """Shades begin at the bound: the control is a text beyond it, in which one character is of three tokens."""
    perfect = PromptFigures("task", "", (1e-12, 3e-12, 0.0), ("a", "b", "c", "d"))
    assert {token.shade for token in heat(perfect, 0.08)} == {0} and not any(t.is_worst for t in heat(perfect, 0.08))
    bad = PromptFigures("task", "", (1e-3, 0.1, 3.0, 0.2), ("a", "b", "東", "", "c"))
    tokens = heat(bad, 0.08)
    assert [(token.text, token.shade, token.is_worst) for token in tokens] == [
        ("a", 0, False), ("b", 0, False), ("東", 4, True), ("c", 1, False),
    ]  # fmt: skip
    assert tokens[2].kl == 3.0
    assert by_text([perfect], 0.08)[0].percent < 1e-6
    assert by_text([bad], 0.08)[0].percent == 100
    assert by_position([replace(perfect, kl=(0.0, 0.0, 0.0))], 0.08) is None and by_position([bad], 0.08)


def test_why_a_figure_is_not_judged(tmp_path: Path) -> None:
    """In the report, on the page, and nowhere in a report that judges it."""
    tail = Metric("p999_kl", 0.1, 0.01, 0.2, unjudged="needs 10,000 positions")
    made = row()
    made = replace(made, gates=(*made.gates[:2], replace(made.gates[2], checks=(*made.gates[2].checks, tail))))
    page = writers.write(report(made), tmp_path)
    assert "shown, not judged: needs 10,000 positions" in page.read_text()
    content = json.loads(page.with_name("report.json").read_text())
    assert content["rows"][0]["gates"][2]["checks"][-1]["unjudged"] == "needs 10,000 positions"
    assert "not judged" not in writers.write(report(row()), tmp_path).read_text()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        writers.write(report(row()), tmp_path / "file" / "parity")
    with pytest.raises(InputError, match="file"), writers.reserved(tmp_path / "file" / "parity"):
        pytest.fail("it could not be written")
    (tmp_path / "there" / "report.html").mkdir(parents=True)
    with pytest.raises(InputError, match=r"report\.html: Is a directory"), writers.reserved(tmp_path / "there"):
        pytest.fail("it could not be written")
    with writers.reserved(tmp_path / "new" / "parity"):
        assert [*(tmp_path / "new" / "parity").iterdir()] == []
    assert not (tmp_path / "new").exists()
    with writers.reserved(tmp_path / "new" / "parity"):
        page = writers.write(report(row()), tmp_path / "new" / "parity")
    assert page.is_file()


@pytest.mark.engine
@needs_browser
@pytest.mark.parametrize(
    ("width", "scheme"),
    [(390, "light"), (390, "dark"), (1000, "light"), (1040, "light"), (1280, "light"), (1280, "dark")],
)
def test_in_a_browser(tmp_path: Path, width: int, scheme: str) -> None:
    page = writers.write(whole("a-name-without-an-end-" * 5), tmp_path)
    measures = (
        "wide: root.scrollWidth - root.clientWidth, drawn: [...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100),"
        "first: document.querySelector('.overview').getBoundingClientRect().top, said: document.querySelector('.ship .name').getBoundingClientRect().bottom,"
        "small: [...document.querySelectorAll('body *')].filter(e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 11).length,"
        "paper: getComputedStyle(document.body).backgroundColor, width: innerWidth"
    )
    seen = look(page, measures, width=width, scheme=scheme)
    assert seen["said"] < 400 and (width < 500 or seen["first"] < 750), "on the first screen"
    assert (seen["wide"], seen["drawn"], seen["small"], seen["width"]) == (0, True, 0, width)
    assert seen["paper"] == ("rgb(251, 252, 253)" if scheme == "light" else "rgb(14, 18, 23)")


def test_baseline(tmp_path: Path) -> None:
    writers.write(report(row("a"), row("b")), tmp_path)
    earlier = tmp_path / "report.json"
    assert regressions(report(row("a"), row("b")), earlier) == ()
    assert regressions(report(row("a", 1.15e-3), row("b", 0.9e-3)), earlier) == ()  # the intervals meet
    (said,) = regressions(report(row("a", 2e-3), row("b")), earlier)
    assert said == "a in llama.cpp: mean_kl 0.001 became 0.002"
    (lost,) = regressions(report(row("a")), earlier)
    assert "b in llama.cpp" in lost
    assert "was met, is missed" in regressions(report(row("a", 0.1, "missed"), row("b")), earlier)[0]
    assert not replace(report(row("a")), regressions=("worse",)).met


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_baseline_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match="format 1"):
        regressions(report(row()), tmp_path / "report.json")


def test_nothing_is_markup_in_the_summary(tmp_path: Path) -> None:
    """Names of directories, prompts and what an engine says are from anywhere, and the file goes into a pull request."""
    hostile = "x|y <img src=a> [l](javascript:x) @team `c` ``d``\n# head\n| a | b |\x1b[2J"
    made = replace(report(row(hostile, 0.1, "missed")), run=hostile, regressions=(hostile,))
    summary = (writers.write(made, tmp_path).parent / "summary.md").read_text()
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", summary)
    for sign in ("<", "[l]", "@team", "javascript", "\x1b"):
        assert sign in hostile and sign not in outside
    lines = summary.splitlines()
    assert [line for line in lines if line.startswith("#")] == lines[:1], "one heading"
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 3 and {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {11}
    plain = (writers.write(report(row()), tmp_path / "plain").parent / "summary.md").read_text()
    assert plain.startswith("### Parity of demo: met\n") and "`" not in plain.splitlines()[0], "the control"
