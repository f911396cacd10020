"""A push of two gigabytes stays small in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.staging import opened
from lora2serve.hub import pull_check
from tests.hub.conftest import client_env, export
from tests.support.hub_server import HubServer


@pytest.mark.engine
@pytest.mark.slow
def test_two_gigabytes_in_little_memory(hub: HubServer, tmp_path: Path) -> None:
    """The peak of pushing 2 GB stays within 200 MB of the imports."""
    path = export(tmp_path, "vllm")
    with opened(tmp_path / "big", overwrite=False) as out:
        file = out.file("model.safetensors", 2_000_000_000)
        for start in range(0, 2_000_000_000, 50_000_000):
            file.pwrite(bytes(50_000_000), start)
        out.publish(Manifest.read(path))
    # VmHWM and not ru_maxrss: that one a child inherits from the process that started it (getrusage(2)).
    program = (
        "from pathlib import Path; import huggingface_hub, httpx2, lora2serve.hub; from lora2serve.cli import run;"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]);"
        f"before = peak(); code = run(['push', {str(tmp_path / 'big')!r}, '--repo-id', 'user/big']);"
        "after = peak(); held = b'x' * 400_000_000; print(code, before, after - before, peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=client_env(hub, tmp_path / "home2"),
        capture_output=True,
        text=True,
        check=True,
    )
    code, before, kilobytes, control = done.stdout.split()[-4:]
    print(f"{int(kilobytes) / 1000:.0f} MB over the imports' {int(before) / 1000:.0f} MB")
    assert (code, int(kilobytes) < 200_000) == ("0", True), done.stdout
    assert int(control) > 200_000, "what is held in memory is seen"
    assert not pull_check("user/big").unlisted_files
