"""Bars of several pieces of work at a time share the terminal."""

from __future__ import annotations

import pytest

from lora2serve.console import Terminal


def test_two_bars_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Each has its line; the first to end takes its own, and the last one all."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    first, second = terminal.track("a: train", 10, "steps"), terminal.track("b: train", 5, "steps")
    advance, other = first.__enter__(), second.__enter__()
    advance(3, "loss 1.5")
    other(2)
    bars = terminal._bars
    assert bars is not None and [task.description for task in bars.tasks] == ["a: train", "b: train"]
    bars.refresh()
    shown = capfd.readouterr().err
    assert all(words in shown for words in ("a: train", "b: train", "3/10", "2/5", "loss 1.5"))
    first.__exit__(None, None, None)
    assert [task.description for task in bars.tasks] == ["b: train"]
    second.__exit__(None, None, None)
    assert terminal._bars is None and bars.finished
    with terminal.track("again", 1) as last:
        last(1)
    assert terminal._bars is None
