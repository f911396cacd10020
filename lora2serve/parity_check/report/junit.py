"""report.xml: JUnit, one test case for each gate of each row, for CI servers."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lora2serve.artifacts.parity_report import ComparisonResult, Gate, ParityReport


def render(report: ParityReport) -> str:
    """The file's text."""
    suites = Element("testsuites", name="lora2serve parity")
    for row in report.rows:
        suites.append(_suite(row))
    if report.regressions:
        suite = SubElement(suites, "testsuite", name="baseline", tests="1", failures="1")
        case = SubElement(suite, "testcase", classname="baseline", name="no regression")
        SubElement(case, "failure", message=_clean(report.regressions[0])).text = _clean("\n".join(report.regressions))
    indent(suites)
    return tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _suite(row: ComparisonResult) -> Element:
    name = f"{row.export}.{row.engine}" if row.engine else row.export
    failed = sum(_kind(row, gate) == "failure" for gate in row.gates)
    skipped = sum(_kind(row, gate) == "skipped" for gate in row.gates)
    counts = {"tests": str(len(row.gates)), "failures": str(failed), "skipped": str(skipped)}
    suite = Element("testsuite", {"name": name, "time": str(row.seconds), **counts})
    for gate in row.gates:
        case = SubElement(suite, "testcase", classname=name, name=gate.name)
        kind = _kind(row, gate)
        if kind:
            message = _clean(f"{gate.cause}; first: {gate.first}" if gate.first else gate.status)
            SubElement(case, kind, message=message).text = message
        lines = [f"{check.name} {check.value:.6g}" for check in gate.checks]
        lines += _settings(row) if gate.name == "settings" else []
        SubElement(case, "system-out").text = _clean("\n".join(lines))
    return suite


def _settings(row: ComparisonResult) -> list[str]:
    return [f"{setting}{f' (allowed by {setting.allowed})' if setting.allowed else ''}" for setting in row.settings]


def _kind(row: ComparisonResult, gate: Gate) -> str:
    if gate.status == "met":
        return ""
    return "failure" if gate.status != "skipped" and row.red else "skipped"


def _clean(text: str) -> str:
    """XML 1.0 has no control characters."""
    return "".join(
        c
        if c in "\t\n" or (ord(c) >= 32 and not 0xD800 <= ord(c) <= 0xDFFF and ord(c) not in (0xFFFE, 0xFFFF))
        else "\ufffd"
        for c in text
    )
