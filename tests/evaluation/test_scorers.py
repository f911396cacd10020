"""Each scorer with an answer that is right and one that is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lora2serve.errors import EngineError, InputError
from lora2serve.evaluation.answerer import EngineAnswer, Turns
from lora2serve.evaluation.scorers import ScorerRecipe, make_scorer, number_in
from lora2serve.evaluation.suite import SuiteItem, read_suite
from lora2serve.evaluation.suite_run import ask_all
from lora2serve.parity_check.chat_models import ChatModel
from tests.support.runs import Told


def score(recipe: str | ScorerRecipe, answer: str, *expected: str, home: Path = Path()) -> float:
    problems: list[str] = []
    scorer = make_scorer(recipe, home, "scorer", problems)
    assert problems == []
    return scorer.score(answer, SuiteItem("1", ({"role": "user", "content": "?"},), expected))


def regex(pattern: str) -> ScorerRecipe:
    return ScorerRecipe("regex", pattern=pattern)


@pytest.mark.parametrize(
    ("recipe", "answer", "expected", "right"),
    [
        ("exact", " Paris\n", ("Rome", "Paris"), 1),
        ("exact", "paris", ("Paris",), 0),
        ("normalized", "The  Paris!", ("paris",), 1),
        ("normalized", "Paris, France", ("paris",), 0),
        ("normalized", "", ("A",), 0),  # an article alone is an answer
        ("normalized", "a.", ("A",), 1),
        ("normalized", "-", ("+",), 0),
        ("normalized", "-40 mg", ("40 mg",), 0),
        ("normalized", "It is 3.5.", ("it is 35",), 0),
        ("normalized", "It is 3.5.", ("it is 3.5",), 1),
        ("normalized", "\u201cCafe\u0301\u201d\u3002", ("Caf\u00e9",), 1),
        ("number", "\u22125", ("5",), 0),
        ("number", "\u22125", ("-5",), 1),
        ("f1", "the cat sat", ("cat sat down", "dog"), 0.8),
        ("f1", "nothing", ("cat",), 0),
        ("f1", "", ("",), 1),
        ("contains", "It is PARIS, of course", ("paris",), 1),
        ("contains", "It is Rome", ("paris",), 0),
        (regex(r"Answer: (\w)"), "So: Answer: B", ("B",), 1),
        (regex(r"Answer: (\w)"), "So: Answer: C", ("B",), 0),
        (regex(r"^\d{4}$"), "2026", (), 1),
        (regex(r"^\d{4}$"), "in 2026", (), 0),
        ("number", "First 3, so it is 1,234.50 $", ("1234.5",), 1),
        ("number", "It is 1,234.6", ("1234.5",), 0),
        ("number", "none", ("1",), 0),
        (ScorerRecipe("number", tolerance=0.01), "3.14", ("3.1416",), 1),
        ("choice", "red", ("red",), 1),
        ("choice", "green", ("red",), 0),
    ],
)
def test_scores(recipe: str | ScorerRecipe, answer: str, expected: tuple[str, ...], right: float) -> None:
    assert score(recipe, answer, *expected) == pytest.approx(right)


def test_numbers() -> None:
    assert [number_in(text) for text in ("-5", "1e3", ".5", "a 7.", "no", "12-3")] == [-5, 1000, 0.5, 7, None, -3]


def test_json_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    recipe = ScorerRecipe("json_schema", schema="s.json")
    assert score(recipe, '{"name": "x"}', home=tmp_path) == 1
    assert score(recipe, 'Here:\n```json\n{"name": "x"}\n```', home=tmp_path) == 1
    bad = ('{"name": 1}', "{}", "name: x", "", '{"name": "x", "age": NaN}')
    assert [score(recipe, text, home=tmp_path) for text in bad] == [0] * 5
    (tmp_path / "s.json").write_text('{"type": "nothing"}')
    problems: list[str] = []
    make_scorer(recipe, tmp_path, "scorer", problems)
    assert "'nothing' is not valid" in problems[0]


def test_a_function_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def length(answer, expected, question):\n    return len(answer) / len(expected[0])\n\ndef bad(*_):\n    return 'x'\n"
    )
    recipe = ScorerRecipe("python", function="own.py:length")
    assert score(recipe, "ab", "abcd", home=tmp_path) == 0.5
    with pytest.raises(InputError, match=r"item 1: 2.0, expected a number from 0 to 1"):
        score(recipe, "abcd", "ab", home=tmp_path)
    with pytest.raises(InputError, match="item 1: 'x'"):
        score(ScorerRecipe("python", function="own.py:bad"), "abcd", "ab", home=tmp_path)


def test_a_function_that_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands on stdout is the result, as JSON."""
    (tmp_path / "own.py").write_text("print('loaded')\n\ndef right(*_):\n    print('asked')\n    return True\n")
    assert score(ScorerRecipe("python", function="own.py:right"), "x", "x", home=tmp_path) == 1
    assert capsys.readouterr() == ("", "loaded\nasked\n")


def test_a_function_that_would_end_the_command(tmp_path: Path) -> None:
    """Its exit code 0 would be a gate that is met."""
    (tmp_path / "own.py").write_text("import sys\n\ndef leave(*_):\n    sys.exit(0)\n")
    (tmp_path / "main.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(InputError, match="item 1: SystemExit: 0"):
        score(ScorerRecipe("python", function="own.py:leave"), "x", "x", home=tmp_path)
    problems: list[str] = []
    make_scorer(ScorerRecipe("python", function="main.py:leave"), tmp_path, "scorer", problems)
    assert problems == ["scorer: python: main.py: SystemExit: 0"]


class Taste(BaseHTTPRequestHandler):
    """A judge that likes what has the most words; or the first answer, whatever it is; or says something else."""

    kind = "longest"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        first, second = text.split("Answer A:\n")[1].split("\n\nReply")[0].split("\n\nAnswer B:\n")
        verdict = "A" if len(first) > len(second) else "B"
        verdict = "Neither" if "odd?" in text else verdict
        said = {"longest": f"{verdict}.", "first": "A", "odd": "Neither, really"}[self.kind]
        self._send({"choices": [{"message": {"content": said}}]})

    def do_GET(self) -> None:
        self._send({"data": [{"id": "judge"}]})

    def _send(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Parrot:
    """Says the same to everything, and at length."""

    def answer(self, messages: Turns, max_tokens: int, temperature: float, base: bool) -> EngineAnswer:
        return EngineAnswer(text="a long answer", end="stop", seconds=0.1, first=0.1, tokens=3)

    def likelihoods(self, messages: Turns, texts: Sequence[str], base: bool) -> EngineAnswer:
        return EngineAnswer(error="it shows none")

    def first_tokens(self, messages: Turns, base: bool) -> dict[str, float]:
        return {}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScorerRecipe]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Taste)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield ScorerRecipe("judge", url=f"http://127.0.0.1:{server.server_port}/v1")
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_in_both_orders(judge: ScorerRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert score(judge, "a long answer", "short") == 1 and score(judge, "short", "a long answer") == 0
    assert score(judge, "same", "same") == 0.5
    monkeypatch.setattr(Taste, "kind", "first")
    assert score(judge, "a long answer", "short") == score(judge, "x", "much longer") == 0.5, "a position is no verdict"
    monkeypatch.setattr(Taste, "kind", "odd")
    with pytest.raises(EngineError, match="expected A, B or tie"):
        score(judge, "a long answer", "short")


def test_a_judge_that_says_something_else_once(judge: ScorerRecipe, tmp_path: Path) -> None:
    """Its item is one without a score; all others keep theirs."""
    (tmp_path / "qa.jsonl").write_text('{"prompt": "a?", "expected": "short"}\n{"prompt": "odd?", "expected": "x"}\n')
    (tmp_path / "qa.yaml").write_text(f"rows: qa.jsonl\nscorer: {{kind: judge, url: '{judge.url}'}}\n")
    told = Told()
    measured = ask_all(Parrot(), "planted", ChatModel("a", "peft", {}), read_suite(tmp_path / "qa.yaml"), told)
    assert [item.score for item in measured.items] == [1.0, 0.0] and measured.failed() == 1
    assert "expected A, B or tie" in measured.items[1].error and "1 of 2 items" in told.warnings[0]
