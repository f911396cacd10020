"""What a user names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora2serve.api.locate import find_run


def test_a_link_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has its own name, by whichever link it was named: what is exported of it is called so."""
    monkeypatch.chdir(tmp_path)
    for path in (Path("runs/demo"), tmp_path / "elsewhere"):
        (path / "adapter").mkdir(parents=True)
        for name in ("run.json", "adapter/adapter_config.json"):
            (path / name).write_text("{}")
    Path("runs/latest").symlink_to("demo")
    Path("runs/mine").symlink_to(tmp_path / "elsewhere")
    for name, path in {
        "runs/demo": Path("runs/demo"),
        "runs/latest": Path("runs/demo"),
        "latest": Path("runs/demo"),
        "mine": tmp_path / "elsewhere",
    }.items():
        run = find_run(name)
        assert run is not None
        assert run.path == path
