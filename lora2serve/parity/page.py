"""report.html: one file that needs nothing else. Tables, pictures of the KL, answers side by side; light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lora2serve.parity.gates import Check, Gate
from lora2serve.parity.pictures import by_position, by_prompt
from lora2serve.parity.report import Answer, Report, Row
from lora2serve.parity.words import NAMES, figure

SHOWN = 8  # worst prompts, answers and tensors

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6570; --line: #d9dee4; --paper: #fff; --card: #f6f8fa;
  --good: #1a7f37; --bad: #c62828; --idle: #8a6d00; --mark: #ffd8d8; --plot: #2f6fde; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #30363d; --paper: #0d1117;
  --card: #161b22; --good: #4cc26a; --bad: #ff7b72; --idle: #d6b450; --mark: #67211f; --plot: #6ea8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .25rem; color: var(--soft); font-weight: 600; }
p { margin: .25rem 0; } .soft { color: var(--soft); } code { font-size: .9em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; } td.n, th.n { text-align: right; white-space: nowrap; }
.met { color: var(--good); } .missed, .failed { color: var(--bad); } .missing, .skipped { color: var(--idle); }
.met, .missed, .failed, .missing { font-weight: 600; } .skipped { font-weight: 400; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .25rem 1rem 1rem;
  margin: 1rem 0; } section h2 { margin-top: .75rem; }
svg { width: 100%; height: auto; display: block; } .axis { stroke: var(--line); } .label { fill: var(--soft);
  font: 11px system-ui, sans-serif; } .dot { fill: var(--plot); fill-opacity: .55; } .bar { fill: var(--plot); }
.bound { stroke: var(--bad); stroke-dasharray: 4 3; } mark { background: var(--mark); color: inherit; }
.first { border-left: 3px solid var(--bad); padding-left: .75rem; margin: .5rem 0; overflow-wrap: anywhere; }
"""


def render(report: Report) -> str:
    """The page."""
    verdict = "met" if report.met else "missed"
    parts = [
        f'<h1>Parity of {escape(report.run)}: <span class="{verdict}">{"met" if report.met else "not met"}</span></h1>',
        f'<p class="soft">{_scored(report)}</p>',
        *(f'<p class="missed">{escape(line)}</p>' for line in report.regressions),
        _table(["Export", "Engine", "Verdict", "Mean KL", "Same top token", "Same answers", "Signal kept", "Against"],
               [_line(row) for row in report.subjects], numbers=(3, 4, 5, 6)),
        _asked(report),
        *(_row(row) for row in report.subjects),
        _made_with(report),
    ]  # fmt: skip
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>Parity of {escape(report.run)}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _scored(report: Report) -> str:
    data = report.data
    return (
        f"{data['positions']} tokens scored: {data['task']} of held-out data, {data['general']} of general text; "
        f"{data['conversations']} prompts compared byte for byte, {data['prompts']} answered."
    )


def _line(row: Row) -> list[str]:
    cells = [figure(name, row.check(name)) for name in ("mean_kl", "top1", "equal_answers", "retention")]
    status = f'<span class="{row.status}">{row.status}</span>'
    return [f'<a href="#{_anchor(row)}">{escape(row.export)}</a>', escape(row.engine), status, *cells, row.reference]


def _anchor(row: Row) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{row.export}-{row.engine}")


def _asked(report: Report) -> str:
    if not report.asked:
        return ""
    rows = [[escape(who), escape(said)] for who, said in report.asked["answers"].items()]
    return f"<h2>{escape(report.asked['prompt'])}</h2>" + _table(["Who", "Answer"], rows)


def _row(row: Row) -> str:
    parts = [f'<section id="{_anchor(row)}"><h2>{escape(row.export)} in {escape(row.engine)}</h2>']
    parts.append(f'<p class="soft">{escape(row.version)}; thresholds of {escape(row.kind)}; {row.seconds} s</p>')
    parts += [_gate(gate) for gate in row.gates]
    if row.prompts:
        bound = next((c.bound for g in row.gates for c in g.checks if c.name == "mean_kl"), None)
        parts.append("<h3>KL by position</h3>" + by_position([prompt.kl for prompt in row.prompts]))
        parts.append("<h3>Mean KL by text, the worst first</h3>" + by_prompt(row.prompts, bound))
    parts += [_both_references(row), _worst_prompts(row), _answers(row.answers), _tensors(row), "</section>"]
    return "\n".join(part for part in parts if part)


def _gate(gate: Gate) -> str:
    head = f'<h3>Gate: {gate.name} <span class="{gate.status}">{gate.status}</span></h3>'
    said = f'<div class="first"><p>{escape(gate.cause)}</p><p class="soft">{escape(gate.first)}</p></div>'
    rows = [_check(check) for check in gate.checks]
    table = _table(["Figure", "Value", "95 % interval", "Bound", ""], rows, numbers=(1, 2, 3)) if rows else ""
    return head + (said if gate.cause or gate.first else "") + table


def _check(check: Check) -> list[str]:
    interval = "" if check.low is None or check.low == check.high else f"{check.low:.3g} to {check.high:.3g}"
    verdict = "" if check.met is None else f'<span class="{_word(check.met)}">{_word(check.met)}</span>'
    bound = "" if check.bound is None else f"{check.bound:g}"
    return [escape(NAMES.get(check.name, check.name)), f"{check.value:.4g}", interval, bound, verdict]


def _word(met: bool) -> str:
    return "met" if met else "missed"


def _both_references(row: Row) -> str:
    if not row.beside:
        return ""
    names = ("mean_kl", "top1", "ln_ppl_ratio")
    shown: dict[str, dict[str, Check]] = {row.reference: {c.name: c for g in row.gates for c in g.checks}}
    shown |= {name: {c.name: c for c in checks} for name, checks in row.beside.items()}
    rows = [[name, *(figure(key, found.get(key)) for key in names)] for name, found in shown.items()]
    head = "<h3>Against both references: as trained, and on the full-precision base</h3>"
    return head + _table(["Reference", *(NAMES[name] for name in names)], rows, numbers=(1, 2, 3))


def _worst_prompts(row: Row) -> str:
    worst = sorted(row.prompts, key=lambda one: max(one.kl, default=0.0), reverse=True)[:SHOWN]
    rows = []
    for one in worst:
        if one.kl:
            mean, largest = sum(one.kl) / len(one.kl), max(one.kl)
            place = str(one.kl.index(largest) + 1)
            rows.append([one.part, escape(one.text[:120]), f"{mean:.3g}", f"{largest:.3g}", place])
    head = "<h3>Texts with the largest KL</h3>"
    return head + _table(["Part", "Text", "Mean KL", "Largest", "at"], rows, numbers=(2, 3, 4)) if rows else ""


def _answers(answers: Sequence[Answer]) -> str:
    """The greedy answers, those that part first; from the parting on they are marked."""
    if not answers:
        return ""
    ordered = sorted(answers, key=lambda one: one.parts < 0)[:SHOWN]
    rows = [[escape(one.prompt), *_marked(one.expected, one.got)] for one in ordered]
    return "<h3>Greedy answers</h3>" + _table(["Prompt", "Trained", "Export"], rows)


def _marked(expected: str, got: str) -> tuple[str, str]:
    at = next((n for n, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    if expected == got:
        return escape(expected), escape(got)
    first, second = (f"{escape(text[:at])}<mark>{escape(text[at:]) or '&nbsp;'}</mark>" for text in (expected, got))
    return first, second


def _tensors(row: Row) -> str:
    worst = [one for one in row.tensors if one["nmse"]][:SHOWN]
    rows = [[f"<code>{escape(one['name'])}</code>", f"{one['nmse']:.3g}", f"{one['largest']:.3g}"] for one in worst]
    head = "<h3>Tensors with the largest error</h3>"
    return head + _table(["Tensor", "NMSE", "Largest difference"], rows, numbers=(1, 2)) if rows else ""


def _made_with(report: Report) -> str:
    said = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    references = "; ".join(f"{name}: {one['version']}" for name, one in report.references.items())
    return f'<p class="soft">References: {escape(references)}.</p><p class="soft">{escape(said)}.</p>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        kind = [f'<{tag} class="n">' if n in numbers else f"<{tag}>" for n in range(len(values))]
        return "".join(f"{k}{value}</{tag}>" for k, value in zip(kind, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", heads)}</tr>{body}</table></div>'
