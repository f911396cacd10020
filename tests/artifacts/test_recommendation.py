"""Which export to ship: the smallest that meets its bounds, for each place where one is served."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora2serve.artifacts.parity_overview import NOT_MEASURED, cells, columns, overview
from lora2serve.artifacts.parity_report import ComparisonResult, Gate, Metric, ParityReport, Status
from lora2serve.artifacts.recommendation import SERVED_IN, recommend

TARGETS = {"gguf": "llama.cpp", "vllm": "transformers", "ollama": "ollama", "lmstudio": "llama.cpp"}


def row(
    export: str = "gguf-Q8_0", target: str = "gguf", size: int = 1000, status: Status = "met", kl: float = 1e-3,
    engine: str = "", kind: str = "Q8_0", required: bool = False, cause: str = "scale or rounding",
) -> ComparisonResult:  # fmt: skip
    checks = (Metric("mean_kl", kl, kl, kl, 4e-3, status == "met"), Metric("equal_answers", 0.5, 0.5, 0.5))
    gate = Gate("behaviour", status, checks, "", "" if status == "met" else cause)
    if status == "missing":
        gate = Gate("tokens", "missing", (), "vllm: not installed", "pip install vllm")
    engine = engine or TARGETS.get(target, "peft")
    return ComparisonResult(export, target, kind, engine, gates=(gate,), size=size, required=required)


rows = st.builds(
    row,
    export=st.sampled_from(["a", "b", "c", "d", "e"]),
    size=st.integers(1, 5),
    status=st.sampled_from(["met", "met", "missed", "failed", "missing"]),
    kl=st.floats(1e-9, 1.0),
    engine=st.sampled_from(["one", "two"]),
    required=st.booleans(),
)


@given(st.lists(rows, min_size=1, max_size=12))
def test_the_smallest_that_meets_its_bounds(drawn: list[ComparisonResult]) -> None:
    """By brute force: an export is proven where one row is met and none is red; of these none is smaller."""
    sizes = {item.export: item.size for item in drawn}
    drawn = [replace(item, size=sizes[item.export]) for item in drawn]
    proven = {
        name: size
        for name, size in sizes.items()
        if any(item.status == "met" for item in drawn if item.export == name)
        and not any(item.red for item in drawn if item.export == name)
    }
    (item,) = recommend(drawn)
    if proven:
        assert item.export in proven and item.size == min(proven.values())
    else:
        assert item.export == "" and item.size == 0
        assert any(
            words in item.reason for words in ("none meets", "does not meet", "none was measured", "required engine")
        )
    assert recommend([replace(each, size=0) for each in drawn]) == (), "sizes of an earlier report are not known"


def test_one_for_each_place() -> None:
    """An Ollama export is not weighed against one for vLLM; a deployment and settings alone are no exports to ship."""
    drawn = [row("vllm", "vllm", 9), row("ollama-Q4_K_M", "ollama", 3), row("gguf-Q8_0", "gguf", 5), row("u", "url", 1)]
    assert [(item.served_in, item.export) for item in recommend(drawn)] == [
        ("vLLM", "vllm"),
        ("Ollama", "ollama-Q4_K_M"),
        ("llama.cpp", "gguf-Q8_0"),
    ]
    assert recommend([replace(item, engine="") for item in drawn]) == ()
    assert set(SERVED_IN.values()) == {"vLLM", "Ollama", "llama.cpp", "LM Studio"}


def test_an_adapter_weighs_what_its_base_does() -> None:
    drawn = [replace(row("adapter", "adapter", 10), base_size=5000), row("vllm-w4a16", "vllm", 2000)]
    (item,) = recommend(drawn)
    assert (item.export, item.size) == ("vllm-w4a16", 2000)
    assert "The next larger one is adapter, 5.0 kB" in item.sentences[2]
    (item,) = recommend([drawn[0], replace(drawn[1], size=6000)])
    assert item.export == "adapter", "the control"


def test_the_reason_in_words() -> None:
    drawn = [
        row("a", size=1, kl=2e-3),
        row("b", size=2),
        row("c", size=3, status="missed"),
        row("a", size=1, status="missing", engine="vllm"),
    ]
    (item,) = recommend(drawn)
    assert item.title == "Ship for llama.cpp"
    assert item.sentences == (
        "The smallest of the 2 that meet their bounds.",
        "Mean KL 0.002 nats, 50% same answers.",
        "The next larger one is b, 2 bytes: mean KL 0.001 nats, 50% same answers.",
        "Not asked in vllm: not installed (pip install vllm).",
    )
    (alone,) = recommend(drawn[:1])
    assert alone.sentences[0] == "It meets its bounds."


@pytest.mark.parametrize(
    ("change", "todo"),
    [
        ({}, "export a type with more bits"),
        ({"kind": "bfloat16"}, "export it again"),
        ({"gates": (Gate("settings", "missed", (), "x is 1, planned 2", "x is not as planned"),)}, "--allow"),
        (
            {"gates": (Gate("behaviour", "missed", (Metric("first_difference", 0.1, met=False),), "", "stop"),)},
            "--allow",
        ),
        ({"gates": (Gate("tensors", "failed", (), "died"),)}, "see in its row what the engine said"),
    ],
)
def test_none_meets_its_bounds(change: dict[str, object], todo: str) -> None:
    """It says so, why, and what to do."""
    (item,) = recommend([replace(row(status="missed"), **change)])  # type: ignore[arg-type]
    assert item.export == "" and item.title == "Nothing to ship for llama.cpp"
    assert item.sentences[0] == "It does not meet its bounds."
    assert todo in item.sentences[1] and item.sentences[1].startswith("gguf-Q8_0 in llama.cpp: ")


def test_what_was_not_measured_is_not_recommended() -> None:
    (item,) = recommend([row(status="missing", engine="vllm")])
    assert item.export == "" and item.sentences == (
        "None was measured: the engine is not here.",
        "gguf-Q8_0 in vllm: not installed (pip install vllm).",
    )


def test_a_required_engine_that_is_not_here() -> None:
    """What to do is to install it; the control: beside one that does not meet its bounds, both are said."""
    missing = row("vllm", "vllm", status="missing", engine="vllm", required=True)
    (item,) = recommend([row("vllm", "vllm"), missing])
    assert item.export == "" and item.sentences == (
        "A required engine is not here.",
        "vllm in vllm: not installed (pip install vllm).",
    )
    (item,) = recommend([row("vllm", "vllm", status="missed"), missing])
    assert item.sentences[0] == "It does not meet its bounds." and len(item.details) == 2
    assert item.details[1] == "vllm in vllm: not installed (pip install vllm)."


def test_it_is_in_the_report_and_not_read_back() -> None:
    """It follows from the rows: what a file claims is passed over."""
    report = ParityReport(rows=(row("big", size=9), row("small", size=2)))
    content = report.to_json()
    assert [item["export"] for item in content["recommendations"]] == ["small"]  # type: ignore[attr-defined]
    content["recommendations"] = [{"export": "big"}]
    again = ParityReport.from_json(content, "report")
    assert again == report and again.recommendations[0].export == "small"
    assert "recommendations" not in ParityReport(rows=(row(size=0),)).to_json()


def test_the_first_table_has_what_one_decides_by() -> None:
    one = replace(
        row("gguf-Q4_K_M", size=2_040_000),
        gates=(
            Gate(
                "behaviour",
                "met",
                (
                    Metric("mean_kl", 0.00079, 0.0007, 0.0009, 0.08, True),
                    Metric("top1", 0.9924, 0.99, 0.995, 0.88, True),
                    Metric("equal_answers", 0.5, 0.5, 0.5),
                    Metric("first_difference", 1.0, 1.0, 1.0, 0.75, True),
                    Metric("retention", 0.001, 0.0, 0.002, unjudged="too faint"),
                ),
            ),
        ),
        speed=31.42, computed="computed in float32, served in bfloat16", reference="trained",
    )  # fmt: skip
    twin = replace(one, export="ollama-Q4_K_M", target="ollama", same_files="gguf-Q4_K_M")
    report = ParityReport(
        rows=(twin, one, row("gguf-F16", size=9), row("vllm", "vllm", status="missing", engine="vllm"))
    )
    assert {key: str(cell) for key, cell in cells(one, report.rows).items()} == {
        "export": "gguf-Q4_K_M (same files as ollama-Q4_K_M: asked once)",
        "engine": "llama.cpp (computed in float32, served in bfloat16)",
        "status": "met",
        "size": "2.0 MB",
        "mean_kl": "0.00079 (≤ 0.08)",
        "top1": "99.24% (≥ 88.00%)",
        "equal_answers": "50% (100% but for near-ties, ≥ 75%)",
        "retention": "99.90% (shown, not judged: too faint)",
        "speed": "31",
        "reference": "trained model (on its quantized base)",
    }
    assert "same files as gguf-Q4_K_M: asked once" in str(cells(twin, report.rows)["export"])
    assert columns(report)["mean_kl"] == "Mean KL, nats"
    table = overview(report)
    assert [(line.result.export, line.recommended) for line in table] == [
        ("ollama-Q4_K_M", "Ollama"),
        ("gguf-F16", "llama.cpp"),
        ("gguf-Q4_K_M", ""),
        ("vllm", ""),
    ]
    assert table[3].cells["speed"].text == NOT_MEASURED and table[3].cells["mean_kl"].text == "-"
    assert [*columns(ParityReport(rows=(replace(one, engine=""),)))] == ["export", "status", "size"]
