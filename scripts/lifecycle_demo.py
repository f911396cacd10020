"""The life of an adapter in production, for real: ``make lifecycle-demo``. Prints the story as a table.

Two versions of the demo are trained, a full one and one that was stopped early, and registered. Both are served by one
vLLM behind the gateway. The early one is caught as a shadow, and again with half of the users, and rolled back; then
somebody insists on it, and the better one takes over by itself. Everything is done by commands and over HTTP.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lora2serve import console

ROOT = Path(__file__).parents[1]
QUESTIONS = ROOT / "recipes" / "demo" / "eval.jsonl"
SERVER, GATEWAY = 8765, 8766
KEY = "demo"
MOST = 300  # requests until a verdict must be there
CONFIG = f"""
upstreams: {{vllm: {{url: 'http://localhost:{SERVER}', max_cpu_loras: 4}}}}
routes:
  towns:
    challenger: {{share: 0.5}}
    decisions: {{rules: [{{measure: truth, worse_by: 0.0, promote_within: 0.0}}]}}
"""


class Story:
    """What happened, when, for the table at the end."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.lines: list[tuple[str, str, str]] = []

    def add(self, what: str, outcome: str) -> None:
        self.lines.append((f"{time.monotonic() - self.start:.0f} s", what, outcome))
        console.Terminal().note(f"{self.lines[-1][0]}: {what}: {outcome}")


def run(folder: Path, *words: str) -> str:
    """One command; its stdout. The demo ends where one fails."""
    command = [sys.executable, "-m", "lora2serve", "--quiet", *words]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lora2serve {' '.join(words)}: exit {done.returncode}")
    return done.stdout.strip()


@contextmanager
def running(folder: Path, url: str, *words: str) -> Iterator[None]:
    """A command that goes on until the block ends; its address answers before it begins."""
    process = subprocess.Popen([sys.executable, "-m", "lora2serve", *words], cwd=folder)
    try:
        while not _answers(url):
            if process.poll() is not None:
                raise SystemExit(f"lora2serve {' '.join(words)}: exit {process.returncode}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def call(path: str, body: object, **headers: str) -> tuple[str, dict[str, str]]:
    """POST to the gateway; the answer and its headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        f"http://localhost:{GATEWAY}{path}", json.dumps(body).encode(), {"Content-Type": "application/json", **named}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode(), {name.lower(): value for name, value in response.headers.items()}


def traffic(folder: Path, alias: str, until: int) -> tuple[int, dict[str, int]]:
    """Ask, and say what would have been right, until an alias points to a version; how many requests, by version."""
    rows = itertools.cycle(json.loads(line)["messages"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines())
    counts: dict[str, int] = {}
    for number, (*question, answer) in zip(range(MOST), rows, strict=False):
        user = f"{alias}-{until}-{number}"
        body = {"model": "towns", "messages": question, "max_tokens": 32, "temperature": 0}
        _, headers = call("/v1/chat/completions", body, x_session_id=user, x_request_id=user)
        counts[headers["x-lora2serve-version"]] = counts.get(headers["x-lora2serve-version"], 0) + 1
        truth = {"request_id": user, "expected": answer["content"]}
        while True:  # the record is written a moment after the answer
            try:
                call("/v1/feedback", truth, Authorization=f"Bearer {KEY}")
                break
            except urllib.error.HTTPError as error:
                if error.code != 404:
                    raise
                time.sleep(0.05)
        if number % 5 == 4 and _aliases(folder).get(alias) == until:
            return number + 1, counts
    raise SystemExit(f"no verdict after {MOST} requests: towns@{alias} is not {until}; {counts}")


def train_and_register(folder: Path, story: Story) -> None:
    """Two versions with their adapter exports, proven."""
    for name, settings in (("full", ()), ("early", ("--set", "train.steps=24"))):
        run(folder, "train", "demo", "--name", name, *settings)
        export = run(folder, "export", f"runs/{name}", "--target", "adapter")
        run(folder, "parity", export, "--engine", "peft")
        version = run(folder, "registry", "add", f"runs/{name}", "--name", "towns")
        loss = json.loads(run(folder, "registry", "show", version, "--json"))["scores"]
        shown = next(f"{score['value']:.2f}" for score in loss if score["metric"] == "loss")
        story.add(f"train, export, prove and register {version}", f"held-out loss {shown}")


def tell(folder: Path, story: Story) -> None:
    """The trials, one after another."""
    run(folder, "registry", "promote", "towns@2", "--to", "shadow")
    count, _ = traffic(folder, "shadow", 1)
    story.add("towns@2 as a shadow: copies of all requests", f"{_verdict(folder)} after {count}")
    run(folder, "registry", "unset", "towns@shadow")
    run(folder, "registry", "promote", "towns@2", "--to", "challenger")
    count, counts = traffic(folder, "challenger", 1)
    story.add("towns@2 answers half of the users", f"{_verdict(folder)} after {count} ({_shown(counts)})")
    run(folder, "registry", "promote", "towns@2", "--why", "somebody insists")
    run(folder, "registry", "promote", "towns@1", "--to", "challenger")
    count, counts = traffic(folder, "champion", 1)
    story.add("towns@2 is champion, towns@1 its challenger", f"{_verdict(folder)} after {count} ({_shown(counts)})")


def main() -> None:
    """The whole story, in a folder of its own."""
    os.environ["LORA2SERVE_FEEDBACK_KEY"] = KEY
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    story = Story()
    with tempfile.TemporaryDirectory(prefix="lifecycle-demo-") as name, ExitStack() as stack:
        folder = Path(name)
        train_and_register(folder, story)
        run(folder, "registry", "promote", "towns@1", "--why", "the first")
        (folder / "gateway.yaml").write_text(CONFIG)
        engine = ["--", "--enforce-eager", "--max-model-len", "256"]
        serve = ["serve", "towns@1/adapter", "--allow-updates", "--port", str(SERVER), *engine]
        stack.enter_context(running(folder, f"http://localhost:{SERVER}/health", *serve))
        gateway = f"http://localhost:{GATEWAY}"
        stack.enter_context(running(folder, f"{gateway}/gateway/health", "gateway", "--port", str(GATEWAY)))
        answer, headers = call("/v1/completions", {"model": "towns", "prompt": "Hello", "max_tokens": 1})
        story.add("one vLLM behind the gateway", f"{json.loads(answer)['model']} is {headers['x-lora2serve-version']}")
        tell(folder, story)
        samples = urllib.request.urlopen(f"{gateway}/metrics").read().decode()
        failed = sum(float(value) for value in re.findall(r"^lora2serve_errors_total\{[^}]*\} (\S+)", samples, re.M))
        story.add("requests that were lost", f"{failed:.0f}")
    console.table("The life of an adapter", ("at", "what", "outcome"), story.lines)


def _aliases(folder: Path) -> dict[str, int]:
    """Where the aliases of towns point."""
    from lora2serve import Registry

    with Registry(folder / "registry") as registry:
        return dict(registry.aliases("towns"))


def _verdict(folder: Path) -> str:
    from lora2serve import Registry

    with Registry(folder / "registry") as registry:
        event = registry.history("towns")[-1]
    return f"{event.kind}: {event.why}"


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{version} {count}" for version, count in sorted(counts.items()))


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
        return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
