"""Files in S3, as commands: a real server of that protocol and the real client, each in an environment of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import httpx2
import pytest

from tests.support.environments import end_group, make_environment
from tests.support.registries import add_export, make_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# What somebody else does in the bucket: make it, list it, write over the largest object, remove it.
OTHERS = """
import sys, boto3
s3 = boto3.client("s3")
def largest():
    return max(s3.list_objects_v2(Bucket="bucket").get("Contents", []), key=lambda one: one["Size"])
match sys.argv[1]:
    case "make":
        s3.create_bucket(Bucket="bucket")
    case "count":
        print(s3.list_objects_v2(Bucket="bucket")["KeyCount"])
    case "change":
        s3.put_object(Bucket="bucket", Key=largest()["Key"], Body=b"x" * largest()["Size"])
    case "remove":
        s3.delete_object(Bucket="bucket", Key=largest()["Key"])
"""


@dataclass
class Bucket:
    python: Path
    environment: dict[str, str] = field(default_factory=dict)

    def other(self, word: str) -> str:
        command = [str(self.python), "-c", OTHERS, word]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout.strip()

    def command(self, *words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lora2serve", *words]
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("s3")
    make_environment(folder / "server", "moto[server]")
    client = folder / "client"  # of our interpreter, in front of what it has
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(client)]
    subprocess.run([*pip, f"s3fs=={fsspec.__version__}"], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = {
        **os.environ, **keys, "AWS_ENDPOINT_URL": address, "PYTHONPATH": f"{client}:{ROOT}",
    }  # fmt: skip
    python = folder / "server" / "bin" / "python"
    command = [str(python), "-m", "moto.server", "-H", "127.0.0.1", "-p", address.rpartition(":")[2]]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(120):
            try:
                httpx2.get(address, timeout=1.0, trust_env=False)
                break
            except httpx2.HTTPError:
                time.sleep(0.5)
        made = Bucket(python, {key: value for key, value in environment.items() if key != "LORA2SERVE_REGISTRY"})
        made.other("make")
        yield made
    finally:
        end_group(server)


def test_files_in_s3(bucket: Bucket, tmp_path: Path) -> None:
    """Added, used elsewhere, damaged, collected, brought back; killed while it adds, and without a server."""
    for seed in range(3):
        run = make_run(tmp_path / f"run-{seed}", seed)
        add_export(run)
        with (run.adapter / "large.bin").open("wb") as file:
            file.write(os.urandom(3 << 20))
    bucket.command("registry", "init", "--content", "s3://bucket/models", cwd=tmp_path)
    assert bucket.command("registry", "add", "run-0", "--name", "a", cwd=tmp_path).stdout == "a@1\n"
    count = bucket.other("count")
    assert bucket.command("registry", "add", "run-0", "--name", "a", cwd=tmp_path).stdout == "a@1\n"
    assert bucket.other("count") == count, "the same content is there once"
    bucket.command("registry", "verify", cwd=tmp_path)
    assert not (tmp_path / "registry" / "versions").exists()
    bucket.command("inspect", "a@1", cwd=tmp_path)
    got = tmp_path / "registry" / "versions" / "a-1" / "adapter" / "large.bin"
    assert got.read_bytes() == (tmp_path / "run-0" / "adapter" / "large.bin").read_bytes()

    command = [sys.executable, "-m", "lora2serve", "registry", "add", "run-1", "--name", "a"]
    for seconds in (1.0, 2.0, 3.0):
        adding = subprocess.Popen(command, env=bucket.environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        adding.send_signal(signal.SIGKILL)
        adding.wait()
        bucket.command("registry", "verify", cwd=tmp_path)
    assert bucket.command("registry", "add", "run-1", "--name", "a", cwd=tmp_path).stdout == "a@2\n"
    assert bucket.command("registry", "add", "run-2", "--name", "a", cwd=tmp_path).stdout == "a@3\n"
    assert bucket.command("registry", "gc", "--keep", "2", cwd=tmp_path).stdout == "a@1\n"
    bucket.command("registry", "verify", cwd=tmp_path)
    assert bucket.command("registry", "add", "run-0", "--name", "a", cwd=tmp_path).stdout == "a@1\n"
    bucket.command("registry", "verify", cwd=tmp_path)

    bucket.other("change")
    assert "large.bin: content changed" in bucket.command("registry", "verify", cwd=tmp_path, code=1).stderr
    bucket.other("remove")
    assert "large.bin: missing" in bucket.command("registry", "verify", cwd=tmp_path, code=1).stderr
    address = bucket.environment["AWS_ENDPOINT_URL"]
    bucket.environment |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
    for words in (("verify",), ("gc",), ("add", "run-1", "--name", "b")):
        told = bucket.command("registry", *words, cwd=tmp_path, code=1).stderr
        assert "s3://bucket/models: " in told and "hint: see that it can be reached" in told and "hidden" not in told
    bucket.environment |= {"AWS_ENDPOINT_URL": address, "AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""}
    assert "s3://bucket/models: " in bucket.command("registry", "verify", cwd=tmp_path, code=1).stderr
