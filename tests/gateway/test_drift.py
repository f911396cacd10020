"""Drift: what is injected is found in 95 % of windows, and nothing in 95 % of windows without it; the command, the page.

Prompts are sentences of real texts: the general text that parity reads, and for another domain the project's own docs.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from html.parser import HTMLParser
from itertools import chain, islice
from pathlib import Path

import pytest

import lora2serve
from lora2serve import Registry
from lora2serve.cli import run as command_line
from lora2serve.errors import InputError, UsageError
from lora2serve.gateway.drift import windows
from lora2serve.gateway.drift.check_drift import keep_references
from lora2serve.gateway.drift.drift_report import DriftReport, render_report
from lora2serve.gateway.drift.drift_test import FeatureDrift, WindowRow, compare_windows
from lora2serve.gateway.drift.languages import language
from lora2serve.gateway.drift.text_features import describe, pairs
from lora2serve.gateway.drift.windows import row_of
from lora2serve.gateway.exchange import read_reply
from lora2serve.gateway.request_record import RequestRecord
from lora2serve.gateway.traffic_store import TrafficStore
from tests.support.browser import look, needs_browser
from tests.support.registries import add_export, make_run

ROOT = Path(lora2serve.__file__).parents[1]
MANY = pytest.mark.parametrize(  # windows, and requests of each
    ("count", "size"), [(3, 400), pytest.param(200, 500, marks=pytest.mark.slow)]
)
NAME = "medical-qa"


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.:?])\s+", text) if len(part.split()) > 5]


GENERAL = sentences((ROOT / "lora2serve/data/general.txt").read_text())
WORDS = {sentence: sentence.split() for sentence in GENERAL}
TECHNICAL = sentences("\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))


def request(chance: random.Random, number: int, domain: Sequence[str] = GENERAL, longer: float = 1.0) -> RequestRecord:
    """A question on some sentences, and an answer whose length has a long tail; of a client that asks several."""
    prompt = "Please explain: " + " ".join(chance.choices(domain, k=chance.choice((1, 2, 3))))
    words = chain.from_iterable(WORDS[sentence] for sentence in chance.choices(GENERAL, k=40))
    answer = " ".join(islice(words, max(3, int(longer * chance.lognormvariate(4, 0.6)))))
    return RequestRecord(
        request_id=f"r{number}", at=float(number), name=NAME, version=1, arm="champion", upstream="prod",
        unit=f"u{number // 2}", path="/v1/chat/completions", status=200, prompt_length=len(prompt),
        answer_length=len(answer), finish="length" if chance.random() < 0.05 else "stop",
        features=describe(prompt, answer),
    )  # fmt: skip


def pool(seed: int, count: int = 1200, **changes: object) -> list[WindowRow]:
    chance = random.Random(seed)
    return [row_of(request(chance, number, **changes)) for number in range(count)]  # type: ignore[arg-type]


@cache
def usual(size: int) -> list[WindowRow]:
    return pool(0, 12 * size // 5)


def found(before: Sequence[WindowRow], now: Sequence[WindowRow], count: int, size: int) -> list[set[str]]:
    """What drifted, in many pairs of windows that have no request in common."""
    chance, drifted = random.Random(1), []
    for _ in range(count):
        first, second = chance.sample(range(len(before)), size), chance.sample(range(len(now)), size)
        if before is now:
            both = chance.sample(range(len(now)), 2 * size)
            first, second = both[:size], both[size:]
        result = compare_windows([before[number] for number in first], [now[number] for number in second])
        drifted.append({each.feature for each in result if each.drifted})
    return drifted


@MANY
def test_nothing_drifts_where_nothing_changed(count: int, size: int) -> None:
    assert sum(not each for each in found(usual(size), usual(size), count, size)) >= 0.95 * count


@MANY
def test_longer_answers_are_found(count: int, size: int) -> None:
    longer = found(usual(size), pool(1, 7 * size // 5, longer=1.3), count, size)
    assert sum("answer.length" in each for each in longer) >= 0.95 * count


@MANY
def test_another_domain_is_found(count: int, size: int) -> None:
    other = found(usual(size), pool(2, 7 * size // 5, domain=TECHNICAL), count, size)
    assert sum("prompt.unseen" in each for each in other) >= 0.95 * count


def rows(count: int, seed: int = 0, **parts: Callable[[random.Random], object]) -> list[WindowRow]:
    chance = random.Random(seed)
    empty = {"numbers": {}, "shares": {}, "categories": {}}
    return [
        WindowRow(f"{seed}-{n}", **{**empty, **{part: {"x": make(chance)} for part, make in parts.items()}})  # type: ignore[arg-type]
        for n in range(count)
    ]


def test_each_kind_of_feature() -> None:
    """Refusals and finish reasons, too; and a change that is certain but too small to matter is no alarm."""
    (share,) = compare_windows(
        rows(500, 1, shares=lambda c: float(c.random() < 0.02)), rows(500, 2, shares=lambda c: float(c.random() < 0.12))
    )
    assert (
        share.drifted
        and share.effect == pytest.approx(share.current - share.reference)
        and share.bins[1].label == "yes"
    )
    (category,) = compare_windows(
        rows(500, 1, categories=lambda c: c.choice("aab")), rows(500, 2, categories=lambda c: c.choice("abb"))
    )
    assert category.drifted and 0.2 < category.effect < 0.5 and {each.label for each in category.bins} == {"a", "b"}
    (small,) = compare_windows(
        rows(1200, 1, numbers=lambda c: c.gauss(0, 1)), rows(1200, 2, numbers=lambda c: c.gauss(0.13, 1))
    )
    assert small.adjusted <= 0.05 and 0 < small.effect < 0.1 and not small.drifted
    (large,) = compare_windows(
        rows(500, 1, numbers=lambda c: c.gauss(0, 1)), rows(500, 2, numbers=lambda c: c.gauss(1, 1))
    )
    assert large.drifted and large.effect == pytest.approx(0.52, abs=0.06)  # 2 * Phi(1 / sqrt 2) - 1
    assert large.psi > 0.25 > small.psi
    assert compare_windows(rows(100, numbers=lambda c: 1.0), rows(100, 1, numbers=lambda c: 1.0)) == []


@pytest.mark.parametrize("count", [5, pytest.param(12, marks=pytest.mark.slow)])  # windows
def test_clients_that_ask_much_are_no_drift(count: int) -> None:
    """The requests of a client are alike. Counted one by one, the control, a few clients are taken for drift."""

    def clients(seed: int, alone: bool) -> list[WindowRow]:
        chance, made = random.Random(seed), []
        for client in range(12):
            level = chance.gauss(0, 3)
            made += [
                WindowRow(f"{seed}-{client}-{n if alone else ''}", {"x": chance.gauss(level, 1)}, {}, {})
                for n in range(40)
            ]
        return made

    alarms = [
        sum(compare_windows(clients(seed, alone), clients(seed + 100, alone))[0].drifted for seed in range(count))
        for alone in (False, True)
    ]
    assert alarms[0] <= 1 and alarms[1] > count / 2


def test_languages() -> None:
    texts = {
        "en": "What is the capital of the country that borders it?",
        "de": "Wie ist das Wetter in der Stadt und was kann ich dort machen?",
        "fr": "Quelle est la capitale de la France et pour quoi est-elle connue ?",
        "es": "¿Cuál es la capital de España y por qué se conoce el nombre?",
        "it": "Qual è il nome della città che è più grande con questo?",
        "pt": "Qual é a capital do Brasil e você não sabe como são as ruas?",
        "nl": "Wat is het grootste land van Europa en hoe groot is dat?",
        "pl": "Jak to jest że nie ma tego dla mnie i co się stało?",
        "tr": "Bu bir soru mu ve ne kadar önemli, nasıl çok iyi olarak?",
        "sv": "Vad är det som jag inte har och hur är det med den?",
        "zh": "这个国家的首都是什么？", "ja": "日本の首都はどこですか。", "ko": "한국의 수도는 어디입니까?",
        "ar": "ما هي عاصمة هذا البلد؟", "cyrillic": "Какая столица этой страны?", "el": "Ποια είναι η πρωτεύουσα;",
        "other": "12345 !!", "latin": "Lorem ipsum dolor sit amet",
    }  # fmt: skip
    assert {text: language(text) for text in texts.values()} == {text: code for code, text in texts.items()}


def test_features_of_texts() -> None:
    made = describe("Wie ist das Wetter und was ist der Grund?", "I'm sorry, but I can't help with that.")
    assert made["answer.refusal"] == 1 and made["prompt.language:de"] == 1 and made["answer.json:none"] == 1
    assert describe("", "")["answer.empty"] == 1 and describe("", "It is sorry weather.")["answer.refusal"] == 0
    for answer, kind in (
        ('{"a": 1}', "valid"),
        ("```json\n[1, 2]\n```", "valid"),
        ('{"a": ', "broken"),
        ("a [1]", "none"),
    ):
        assert describe("", answer)[f"answer.json:{kind}"] == 1, answer
    assert (
        describe("", "a b c d " * 10)["answer.repetition"] > 0.8 > 0.1 > describe("", GENERAL[0])["answer.repetition"]
    )
    assert pairs("one two three four five six") == pairs("ONE two, three four five six!")
    assert len(pairs(" ".join(GENERAL))) == 24 and pairs("日本の首都はどこですか")
    assert describe("\ud800 a b", "\ud800")["answer.json:none"] == 1  # half a character


def test_the_log_probability_of_an_answer() -> None:
    """As chats and completions have it, whole and in a stream; without it there is none."""
    tokens = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -3.0}]
    chat = {"choices": [{"index": 0, "message": {"content": "ab"}, "logprobs": {"content": tokens}}]}
    completion = {"choices": [{"index": 0, "text": "ab", "logprobs": {"token_logprobs": [None, -2.0]}}]}
    events = [
        {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [each]}}]} for each in tokens
    ]
    stream = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    assert read_reply(json.dumps(chat).encode(), stream=False).logprob == -2.0
    assert read_reply(json.dumps(completion).encode(), stream=False).logprob == -2.0
    assert read_reply(stream, stream=True).logprob == -2.0
    assert (
        read_reply(json.dumps({"choices": [{"text": "ab", "logprobs": None}]}).encode(), stream=False).logprob is None
    )


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A champion that became it now, and the folder of a gateway."""
    monkeypatch.chdir(tmp_path)
    with Registry("registry") as registry:
        add_export(run := make_run(tmp_path / "run"))
        registry.add(run.path, name=NAME)
        registry.promote(f"{NAME}@1")
    return tmp_path / "gateway"


def fill(
    folder: Path, since: float, until: float, count: int, seed: int, arm: str = "champion", **changes: object
) -> None:
    chance, store = random.Random(seed), TrafficStore(folder)
    step = (until - since) / count
    store.append([
        replace(request(chance, number, **changes), at=since + number * step, arm=arm, prompt="private", answer="private")  # type: ignore[arg-type]
        for number in range(count)
    ])  # fmt: skip
    store.close()


HOUR = 3600.0


@pytest.mark.parametrize("count", [120, pytest.param(300, marks=pytest.mark.slow)])
def test_the_command(
    served: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Against what it was promoted on, as shadow; the reference stays when its records have gone."""
    now = time.time()
    fill(served, now - 6 * HOUR, now - 60, count, 1, arm="shadow")
    clock = [now + 13 * HOUR]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    fill(served, now + HOUR, clock[0], count, 2)
    assert command_line(["drift", NAME, "--window", "12h"]) == 0
    out, err = capsys.readouterr()
    assert "Nothing drifted of" in out and f"reference of medical-qa@1 stored: {count} requests" in err
    stored = served / "drift" / f"{NAME}@1.jsonl"
    assert "private" not in stored.read_text()
    (served / "traffic.db").unlink()
    clock[0] += 24 * HOUR
    fill(served, clock[0] - 10 * HOUR, clock[0], count, 3, domain=TECHNICAL, longer=1.5)
    assert command_line(["drift", NAME, "--window", "12h", "--json"]) == 3
    content = json.loads(capsys.readouterr().out)
    drifted = {each["feature"] for each in content["features"] if each["drifted"]}
    assert {"prompt.unseen", "answer.length"} <= drifted and not drifted & {"answer.finish", "answer.refusal"}
    page = served / "drift" / NAME / "report.html"
    assert page.is_file() and DriftReport.from_json(content, "x").verdict in page.read_text().replace("&gt;", ">")
    made = lora2serve.drift(NAME, window="12h", folder=served, renew=True)
    assert not made.features and made.verdict.startswith("The last window is the reference")
    clock[0] += HOUR
    fill(served, clock[0] - HOUR / 2, clock[0], count, 4, domain=TECHNICAL, longer=1.5)
    assert not lora2serve.drift(NAME, window="12h", folder=served, report=served / "page").drifted
    assert (served / "page" / "report.json").is_file()


def test_what_it_refuses(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no traffic\.db of a gateway"):
        lora2serve.drift(NAME, folder=served)
    now = time.time()
    fill(served, now - 100, now - 50, 30, 0)
    with pytest.raises(UsageError, match="30 requests before that: its reference is complete at 20"):
        lora2serve.drift(NAME, folder=served)
    monkeypatch.setattr(time, "time", lambda: now + 100 * HOUR)
    with pytest.raises(UsageError, match=r"reference: 0 requests, 20.*expected 100 or more"):
        lora2serve.drift(NAME, window="1d", folder=served)
    for text in ("7", "0d", "x", "7 d"):
        with pytest.raises(UsageError, match="expected hours, days or weeks"):
            lora2serve.drift(NAME, window=text)
    with pytest.raises(UsageError, match=r"medical-qb.*did you mean 'medical-qa'"):
        lora2serve.drift("medical-qb", folder=served)
    stored = served / "drift" / f"{NAME}@1.jsonl"
    stored.parent.mkdir()
    for text in ("", "1 2\n{", "x y\n", "1 2\n[1]\n"):
        stored.write_text(text)
        with pytest.raises(InputError, match="not a stored window"):
            lora2serve.drift(NAME, folder=served)


def test_the_gateway_keeps_the_reference(served: Path) -> None:
    """Of a champion that was tried before; of one that nobody has asked yet, later."""
    store, now = TrafficStore(served), time.time()
    stored = served / "drift" / f"{NAME}@1.jsonl"
    with Registry("registry") as registry:
        fill(served, now - 2 * HOUR, now - HOUR, 50, 1, arm="shadow")
        keep_references(registry, store, {NAME: 1})
        assert not stored.exists()
        fill(served, now - HOUR, now - 60, 100, 2, arm="challenger")
        keep_references(registry, store, {NAME: 1})
        first = stored.read_text()
        assert len(first.splitlines()) == 151
        keep_references(registry, store, {NAME: 1})
    assert stored.read_text() == first


def test_windows_do_not_overlap(served: Path) -> None:
    store = TrafficStore(served)
    fill(served, 0, 1000, 400, 0)
    reference, new = windows.find_reference(store, NAME, 1, 500.0, 300.0, 1000.0)
    again = windows.find_reference(store, NAME, 1, 500.0, 300.0, 2000.0)
    assert new and not again[1] and (reference.since, reference.until, len(reference.records)) == (200.0, 500.0, 120)
    assert again[0].records[5] == replace(reference.records[5], prompt=None, answer=None, sequence=0)
    current = windows.current_window(store, NAME, 1, reference, 700.0, 1000.0)
    assert (current.since, len(current.records)) == (500.0, 200)
    assert datetime.fromtimestamp(0, UTC).strftime("%Y-%m-%d") in windows.RequestWindow(0, 1, []).shown


class Closed(HTMLParser):
    """Every tag that is opened is closed, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert all((value or "").startswith(("#", "data:")) for name, value in attrs if name in ("src", "href"))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@cache
def drift_report() -> DriftReport:
    before, now = pool(3, 200), pool(4, 200, domain=TECHNICAL, longer=1.4)
    features = compare_windows(before, now)
    evil = FeatureDrift("answer.<b>", "category", 0.5, 0.4, 0.1, 1.0, 1.0, 0.0, False, features[0].bins)
    return DriftReport(1, NAME, 1, "2026-11-28T00:00:00Z", "200 requests", "200 requests", (*features, evil))


def test_the_page_is_whole() -> None:
    made = drift_report()
    page = render_report(made)
    parser = Closed()
    parser.feed(page)
    assert parser.open == [] and "answer.&lt;b&gt;" in page and "<b>" not in page
    assert DriftReport.from_text(made.to_text(), "x") == made


@pytest.mark.engine
@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), pytest.param(1280, "light", marks=pytest.mark.slow)])
def test_the_page_in_a_browser(tmp_path: Path, width: int, scheme: str) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_report(drift_report()))
    measures = (
        "wide: root.scrollWidth - root.clientWidth, width: innerWidth,"
        "bars: [...document.querySelectorAll('.bars i')].filter(e => e.getBoundingClientRect().height < 5).length,"
        "drawn: document.querySelectorAll('.bars i').length, paper: getComputedStyle(document.body).color"
    )
    seen = look(page, measures, width=width, scheme=scheme)
    assert (seen["wide"], seen["width"], seen["bars"]) == (0, width, 0) and seen["drawn"] > 40
    assert seen["paper"] == ("rgb(0, 0, 0)" if scheme == "light" else "rgb(255, 255, 255)")
