"""report.html: one file that needs nothing else. Tables, pictures of the KL, texts side by side; light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from lora2serve.artifacts.metric_table import OVERVIEW, bound, figure, head, higher_is_better, interval, label
from lora2serve.artifacts.parity_report import Answer, ComparisonResult, Gate, Metric, ParityReport
from lora2serve.parity_check.report.charts import by_position, by_prompt, heat, key

SHOWN = 8  # answers and tensors


def render(report: ParityReport) -> str:
    """The page."""
    verdict = '<span class="pill met">met</span>' if report.met else '<span class="pill missed">not met</span>'
    parts = [
        f"<header><h1>Parity of {escape(report.run)} {verdict}</h1>",
        f'<p class="soft">{_scored(report)}</p></header>',
        *(f'<div class="first"><b>Worse than the baseline</b>{escape(line)}</div>' for line in report.regressions),
        _table(["Export", "Engine", "", *map(head, OVERVIEW), "Against"],
               [_line(row) for row in report.rows], (3, 4, 5, 6), "overview"),
        _asked(report),
        *(_row(row) for row in report.rows),
        _made_with(report),
    ]  # fmt: skip
    style = resources.files("lora2serve.parity_check.report").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>Parity of {escape(report.run)}</title>\n<style>\n{style}</style>\n'
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _scored(report: ParityReport) -> str:
    data = report.data
    short = f" ({data.asked:,} were asked for)" if data.positions < data.asked else ""
    return (
        f"{data.positions:,} tokens scored{short}: {data.task:,} of held-out rows, "
        f"{data.general:,} of general text. {data.conversations} prompts compared byte for byte, "
        f"{data.prompts} answered."
    )


def _line(row: ComparisonResult) -> list[str]:
    cells = [_shown(row.check(name)) for name in OVERVIEW]
    return [f'<a href="#{_anchor(row)}">{escape(row.export)}</a>', escape(row.engine), _pill(row.status), *cells,
            row.reference]  # fmt: skip


def _pill(status: str) -> str:
    return f'<span class="pill {status}">{status}</span>'


def _anchor(row: ComparisonResult) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{row.export}-{row.engine}")


def _asked(report: ParityReport) -> str:
    if not report.asked.prompt:
        return ""
    rows = [[escape(who), escape(said)] for who, said in report.asked.answers.items()]
    return f"<h3>Asked: {escape(report.asked.prompt)}</h3>" + _table(["Who", "Answer"], rows)


def _row(row: ComparisonResult) -> str:
    """One export in one engine; open where something is red."""
    steps = "".join(f"<li>{gate.name} {_pill(gate.status)}</li>" for gate in row.gates)
    parts = [
        f'<section id="{_anchor(row)}"><details{" open" if row.red else ""}>',
        f"<summary><h2>{escape(row.export)} in {escape(row.engine)}</h2>{_pill(row.status)}</summary>",
        f'<div class="body"><ol class="steps">{steps}</ol>',
        f'<p class="soft">{escape(row.version)}; bounds of {escape(row.kind)}; {row.seconds} s</p>',
        *(_cause(gate) for gate in row.gates),
        *(_gate(gate) for gate in row.gates),
        _pictures(row),
        _beside(row),
        _worst_texts(row),
        _answers(row.answers),
        _tensors(row),
        "</div></details></section>",
    ]
    return "\n".join(part for part in parts if part)


def _cause(gate: Gate) -> str:
    if not gate.cause and not gate.first:
        return ""
    return f'<div class="first"><b>{escape(gate.cause or gate.status)}</b>{escape(gate.first)}</div>'


def _gate(gate: Gate) -> str:
    rows = [_check(check) for check in gate.checks]
    heads = ["Figure", "Value", "Bound"]
    return f"<h3>{gate.name}</h3>" + _table(heads, rows, numbers=(1, 2)) if rows else ""


def _check(check: Metric) -> list[str]:
    ends = interval(check.name, check.low, check.high, 3)
    small = f"<small>{ends}</small>" if ends else ""
    judged = f"{bound(check.name, check.bound)}{_meter(check)}"
    return [escape(label(check.name)), f"{figure(check.name, check.value, 4)}{small}", judged]


def _shown(check: Metric | None) -> str:
    return check.shown() if check else "-"


def _meter(check: Metric) -> str:
    """How much of its bound the worse end of the interval takes."""
    if check.bound is None or check.met is None:
        return ""
    low, high = (check.value if end is None else end for end in (check.low, check.high))
    used, room = (1 - low, 1 - check.bound) if higher_is_better(check.name) else (max(abs(low), abs(high)), check.bound)
    share = min(1.0, used / room) if room > 0 and math.isfinite(used) else float(not check.met)
    said = "met" if check.met else "missed"
    return f'<span class="meter {said}" title="{said}"><i style="width:{100 * share:.0f}%"></i></span>'


def _pictures(row: ComparisonResult) -> str:
    if not row.prompts:
        return ""
    bound = next((c.bound for gate in row.gates for c in gate.checks if c.name == "p999_kl"), None)
    dots = "<h3>KL by position, in nats</h3>" + by_position(row.prompts, bound)
    return dots + "<h3>Mean KL by text, the worst first</h3>" + key() + by_prompt(row.prompts)


def _beside(row: ComparisonResult) -> str:
    """Both references, and both parts of the data."""
    if not row.beside and not row.parts:
        return ""
    names = ("mean_kl", "p99_kl", "top1", "ln_ppl_ratio")
    main = {c.name: c for g in row.gates for c in g.checks}
    told = {"original": "on the full-precision base", "trained": "as trained, on the quantised base"}
    shown = {f"all, {told[row.reference]} (the verdict)": main}
    shown |= {f"all, {told[name]}": {c.name: c for c in checks} for name, checks in row.beside.items()}
    words = {"task": "held-out rows", "general": "general text"}
    shown |= {f"{words[name]}": {c.name: c for c in checks} for name, checks in row.parts.items()}
    rows = [[said, *(_shown(found.get(key)) for key in names)] for said, found in shown.items()]
    return "<h3>Against the trained model</h3>" + _table(["Compared", *map(head, names)], rows, (1, 2, 3, 4))


def _worst_texts(row: ComparisonResult) -> str:
    """The texts with the largest KL, token by token."""
    worst = sorted((one for one in row.prompts if one.tokens), key=lambda one: max(one.kl), reverse=True)
    if not worst:
        return ""
    parts = []
    for one in worst:
        at = one.kl.index(max(one.kl))
        said = (
            f"largest {max(one.kl):.2g} at token {at + 2}, {one.tokens[at + 1]!r}; mean {sum(one.kl) / len(one.kl):.2g}"
        )
        parts.append(f'<p class="soft">{escape(said)}</p>{heat(one)}')
    return "<h3>Texts with the largest KL</h3>" + "".join(parts)


def _answers(answers: Sequence[Answer]) -> str:
    """The greedy answers, those that part first; from the parting on they are marked."""
    if not answers:
        return ""
    pairs = []
    for one in sorted(answers, key=lambda one: one.parts < 0)[:SHOWN]:
        expected, got = _marked(one.expected, one.got)
        verdict = "the same" if one.parts < 0 else f"parts at token {one.parts + 1}"
        pairs.append(
            f'<div class="pair"><p><b>{escape(one.prompt)}</b> <span class="soft">{verdict}</span></p>'
            f"<div><small>Trained</small>{expected}</div><div><small>Export</small>{got}</div></div>"
        )
    return "<h3>Greedy answers side by side</h3>" + "".join(pairs)


def _marked(expected: str, got: str) -> tuple[str, str]:
    at = next((n for n, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    if expected == got:
        return escape(expected), escape(got)
    first, second = (f"{escape(text[:at])}<mark>{escape(text[at:]) or '&nbsp;'}</mark>" for text in (expected, got))
    return first, second


def _tensors(row: ComparisonResult) -> str:
    worst = [one for one in row.tensors if one.nmse][:SHOWN]
    rows = [
        [f"<code>{escape(one.name)}</code>", f"{one.nmse:.3g}", f"{one.worst:.3g}", f"{one.largest:.3g}"]
        for one in worst
    ]
    heads = ["Tensor", "NMSE", "Its worst 256 values", "Largest difference"]
    return "<h3>Tensors with the largest error</h3>" + _table(heads, rows, numbers=(1, 2, 3)) if rows else ""


def _made_with(report: ParityReport) -> str:
    said = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    references = "; ".join(f"{name}: {one.version}" for name, one in report.references.items())
    return f"<footer><p>References: {escape(references)}.</p><p>{escape(said)}.</p></footer>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), kind: str = "") -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        opened = [f'<{tag} class="n">' if n in numbers else f"<{tag}>" for n in range(len(values))]
        return "".join(f"{start}{value}</{tag}>" for start, value in zip(opened, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{cells("th", heads)}</tr>{body}</table></div>'
