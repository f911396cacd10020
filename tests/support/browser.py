"""A page in a real browser: what it measures of itself, at a width and in a color scheme."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
NO_BROWSER = "THE PAGE WAS NOT LOOKED AT: no Chromium here (apt install chromium)"
needs_browser = pytest.mark.skipif(BROWSER is None and "GITHUB_ACTIONS" not in os.environ, reason=NO_BROWSER)


def look(page: Path, measures: str, *, width: int = 1280, scheme: str = "light") -> dict[str, Any]:
    """``measures`` is the inside of a JavaScript object, evaluated in the loaded page, where ``root`` is its root.

    Nothing may be written to the console.
    """
    assert BROWSER, NO_BROWSER  # GitHub's machines have one
    probe = (
        "<script>addEventListener('load', () => { const root = document.documentElement;"
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        f"document.title = JSON.stringify({{measured: 1, {measures}}}) }})</script>"
    )
    # headless windows are at least 500 wide: a frame of the wanted width is not
    probed, frame = page.with_name("probed.html"), page.with_name("frame.html")
    probed.write_text(page.read_text().replace("</head>", f"{probe}</head>"))
    frame.write_text(
        f"<meta name='color-scheme' content='{scheme}'><iframe id=f style='width:{width}px;height:900px;border:0' src='probed.html'></iframe>"
        "<script>f.onload = () => setTimeout(() => document.body.append(f.contentDocument.title), 100)</script>"
    )
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
            "--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            "--virtual-time-budget=3000", "--window-size=1400,1000", "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    return json.loads(re.search(r"\{\"measured.*?\}", done.stdout).group())  # type: ignore[union-attr,no-any-return]
