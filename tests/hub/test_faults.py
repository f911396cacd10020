"""Every fault, then the same push again: exactly one right final state, whatever went wrong before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora2serve import Registry
from lora2serve.artifacts.export_dir import Export
from lora2serve.errors import HubError
from lora2serve.hub import fetch, pull_check, push
from lora2serve.progress import Silent
from tests.hub.conftest import TOKEN, client_env, connect, export, same
from tests.support.hub_handler import ROUTES
from tests.support.hub_server import Fault, HubServer
from tests.support.registries import add_export, make_run

pytestmark = pytest.mark.engine

REPO = "user/demo"
STEPS = ["create", "validate", "preupload", "batch", "put", "verify", "commit", "tree", "info"]
PULL_REQUEST = ["whoami", "discussions", "commit", "preupload", "tree"]  # of a push with --create-pr
MULTIPART = ["part", "complete"]
PULL = ["tree", "resolve", "storage"]
SYNC = ["refs", "tag", "branch", "remove_branch"]  # of a registry
GIVES_UP = 200  # more failures than any of the tries lasts


def settle(hub: HubServer, path: Path, ref: str = "main") -> None:
    """Push again without a fault; then one commit, the right files, no more, and byte-equal on pull."""
    for fault in hub.faults:
        fault.times = 0
    push([path], repo_id=REPO, revision=None if ref == "main" else ref)
    same(hub, REPO, path, ref)
    assert len(hub.repos[REPO].log(ref)) == 2, hub.repos[REPO].log(ref)
    checked = pull_check(REPO, ref)
    assert not checked.unlisted_files
    for name in Export.open(path).manifest.files:
        assert (checked.path / name).read_bytes() == (path / name).read_bytes()


def one_pull_request(hub: HubServer, path: Path) -> None:
    """One, with the right files, and nothing of them on the branch; then the same push without it."""
    assert [pull.status for pull in hub.repos[REPO].pulls] == ["open"]
    same(hub, REPO, path, "refs/pr/1")
    assert hub.repos[REPO].log() == ["initial commit"]
    settle(hub, path)


def failing(hub: HubServer, step: str, status: int, times: int = 2) -> Fault:
    return hub.fail(step, status=status, times=times, headers={"Retry-After": "1"} if status == 429 else {})


def test_every_endpoint_is_made_to_fail() -> None:
    """What the server answers, and what the tests below let fail: the same list."""
    answered = {endpoint for _, _, endpoint in ROUTES}
    assert answered == {*STEPS, *PULL_REQUEST, *MULTIPART, *PULL, *SYNC, "xet", "delete"}


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize("step", STEPS)
def test_two_failures_are_survived(hub: HubServer, tmp_path: Path, step: str, status: int) -> None:
    path = export(tmp_path, "vllm")
    fault = failing(hub, step, status)
    push([path], repo_id=REPO)
    assert fault.times == 0, "the fault was met"
    settle(hub, path)


@pytest.mark.parametrize("kind", ["status", "lost"])
@pytest.mark.parametrize("step", SYNC)
def test_a_registry_is_sent_all_the_same(hub: HubServer, tmp_path: Path, step: str, kind: str) -> None:
    """An alias that moves: its branch is removed and made again, whatever is lost on the way."""
    with Registry(tmp_path / "registry") as registry:

        def add(seed: int) -> None:
            run = make_run(tmp_path / f"run-{seed}", seed)
            add_export(run)
            registry.add(run.path, name="demo", unproven=True)

        add(0)
        registry.promote("demo@1")
        registry.sync("demo", to=f"hub:{REPO}", progress=Silent())
        add(1)
        registry.promote("demo@2")
        fault = hub.fail(step, kind)
        registry.sync("demo", to=f"hub:{REPO}", progress=Silent())
        assert hub.repos[REPO].refs["champion"] == hub.repos[REPO].refs["v2"]
        assert fault.times == 0, "the fault was met"


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize("step", PULL_REQUEST)
def test_two_failures_on_the_way_into_a_pull_request(hub: HubServer, tmp_path: Path, step: str, status: int) -> None:
    path = export(tmp_path, "vllm")
    fault = failing(hub, step, status)
    push([path], repo_id=REPO, create_pr=True)
    assert fault.times == 0, "the fault was met"
    one_pull_request(hub, path)


@pytest.mark.parametrize("status", [503, 429])
def test_two_failures_of_a_branch(hub: HubServer, tmp_path: Path, status: int) -> None:
    path = export(tmp_path, "vllm")
    fault = failing(hub, "branch", status)
    push([path], repo_id=REPO, revision="v2")
    assert fault.times == 0, "the fault was met"
    settle(hub, path, "v2")


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize("step", MULTIPART)
def test_two_failures_of_a_multipart_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, status: int
) -> None:
    with HubServer(tmp_path / "hub", chunk=4000) as hub:
        hub.tokens[TOKEN] = ("user", "write")
        connect(hub, tmp_path / "home", monkeypatch)
        path = export(tmp_path, "vllm")
        fault = failing(hub, step, status)
        push([path], repo_id=REPO)
        assert fault.times == 0, "the fault was met"
        settle(hub, path)


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize("step", PULL)
def test_two_failures_of_a_pull(hub: HubServer, tmp_path: Path, step: str, status: int) -> None:
    path = export(tmp_path, "vllm")
    push([path], repo_id=REPO)
    fault = failing(hub, step, status)
    checked = pull_check(REPO)
    assert fault.times == 0, "the fault was met"
    for name in Export.open(path).manifest.files:
        assert (checked.path / name).read_bytes() == (path / name).read_bytes()
    fetched = failing(hub, "info", status)
    assert fetch(REPO).commit == checked.commit
    assert fetched.times == 0


def test_a_hub_that_does_not_even_tell_its_revisions(hub: HubServer) -> None:
    """``refs`` is asked for a better hint only: without it, the error is the same."""
    hub.add(REPO, {"config.json": b"{}"})
    hub.fail("refs", status=503, times=GIVES_UP)
    with pytest.raises(HubError, match="no revision 'mian'"):
        fetch(f"{REPO}@mian")


@pytest.mark.parametrize("step", [step for step in STEPS if step != "verify"])  # what is stored needs no verdict
def test_a_hub_that_is_down_is_one_line_and_a_rerun_is_whole(hub: HubServer, tmp_path: Path, step: str) -> None:
    path = export(tmp_path, "vllm")
    hub.fail(step, status=503, times=GIVES_UP)
    with pytest.raises(HubError) as caught:
        push([path], repo_id=REPO)
    said = "not JSON" if step == "validate" else "503"  # the client reads that answer before it looks at the status
    assert said in caught.value.message
    assert "again" in caught.value.hint
    assert "\n" not in caught.value.message
    assert REPO not in hub.repos or hub.repos[REPO].log() == ["initial commit"]
    settle(hub, path)


@pytest.mark.parametrize("step", ["create", "preupload", "batch", "put", "verify", "commit"])
@pytest.mark.parametrize("kind", ["reset", "lost"])
def test_a_broken_line(hub: HubServer, tmp_path: Path, step: str, kind: str) -> None:
    """``lost``: the Hub did the work, and only the answer is missing."""
    path = export(tmp_path, "vllm")
    fault = hub.fail(step, kind, times=2)
    push([path], repo_id=REPO)
    assert fault.times < 2
    settle(hub, path)
    if step == "commit" and kind == "lost":
        assert hub.count("commit") == 1, "an accepted commit is not sent twice"


def test_a_lost_pull_request(hub: HubServer, tmp_path: Path) -> None:
    """It was opened, and only the answer is missing: found again by its title, not opened twice."""
    path = export(tmp_path, "vllm")
    fault = hub.fail("commit", "lost", times=1)
    push([path], repo_id=REPO, create_pr=True)
    assert fault.times == 0
    one_pull_request(hub, path)


def test_wrong_contents_are_not_published(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    hub.fail("put", "corrupt")
    with pytest.raises(HubError, match="422"):
        push([path], repo_id=REPO)
    assert hub.repos[REPO].log() == ["initial commit"]
    settle(hub, path)


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_hub_that_shows_other_contents(hub: HubServer, tmp_path: Path, create_pr: bool) -> None:
    """The commit was answered with 200, but the tree is not ours: found, and put right by the next push."""
    path = export(tmp_path, "vllm")
    hub.fail("commit", "swap", times=1)
    with pytest.raises(HubError, match="shows other contents for"):
        push([path], repo_id=REPO, create_pr=create_pr)
    push([path], repo_id=REPO, create_pr=create_pr)
    same(hub, REPO, path, "refs/pr/1" if create_pr else "main")
    assert len(hub.repos[REPO].pulls) == create_pr
    assert len(hub.repos[REPO].log()) == (1 if create_pr else 3)


@pytest.mark.parametrize(("status", "words"), [(401, "the token was refused"), (403, "forbidden"), (413, "413")])
@pytest.mark.parametrize("step", ["create", "preupload", "batch", "commit"])
def test_refusals_are_not_retried(hub: HubServer, tmp_path: Path, step: str, status: int, words: str) -> None:
    path = export(tmp_path, "vllm")
    message = {401: "Invalid credentials in Authorization header", 403: "no", 413: "too large"}[status]
    fault = hub.fail(step, status=status, times=GIVES_UP, headers={"X-Error-Message": message})
    with pytest.raises(HubError) as caught:
        push([path], repo_id=REPO)
    assert words in caught.value.message and "\n" not in caught.value.message
    assert fault.times == GIVES_UP - 1
    settle(hub, path)


def test_read_only_token(hub: HubServer, tmp_path: Path) -> None:
    hub.tokens[TOKEN] = ("user", "read")
    with pytest.raises(HubError, match="forbidden") as caught:
        push([export(tmp_path, "vllm")], repo_id=REPO)
    assert "write access" in caught.value.hint


def test_a_branch_that_moved(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone else commits between our look at the repository and our commit: 412, and nothing overwritten."""
    path = export(tmp_path, "vllm")
    hub.create(REPO)
    held = hub.fail("put", "hold")
    import threading

    def other() -> None:
        held.reached.wait(10)
        hub.add(REPO, {"config.json": b"someone else's"}, title="theirs")
        held.release.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(HubError, match="someone else committed") as caught:
        push([path], repo_id=REPO)
    thread.join()
    assert "run again" in caught.value.hint
    assert hub.repos[REPO].log() == ["theirs", "initial commit"]
    uploads = hub.count("put")
    push([path], repo_id=REPO)
    same(hub, REPO, path)
    assert hub.count("put") == uploads, "what is uploaded stays uploaded"
    assert len(hub.repos[REPO].log()) == 3


def test_412_from_the_hub_itself(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    hub.fail("commit", status=412)
    with pytest.raises(HubError, match="someone else committed"):
        push([path], repo_id=REPO)
    settle(hub, path)


def test_slow_lines(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    hub.fail("put", "slow")
    hub.fail("commit", "slow")
    push([path], repo_id=REPO)
    hub.fail("storage", "slow")
    settle(hub, path)


@pytest.mark.parametrize("step", ["put", "commit"])
def test_a_killed_client(hub: HubServer, tmp_path: Path, step: str) -> None:
    """Killed while the Hub is at work, which may still do what it was asked for."""
    path = export(tmp_path, "vllm")
    held = hub.fail(step, "hold")
    client = run_client(hub, tmp_path, path)
    assert held.reached.wait(60)
    assert hub.repos[REPO].log() == ["initial commit"], "a reader sees nothing of it"
    os.kill(client.pid, signal.SIGKILL)
    client.wait(10)
    held.release.set()
    settle(hub, path)


@pytest.mark.parametrize("step", ["put", "commit"])
def test_interrupted(hub: HubServer, tmp_path: Path, step: str) -> None:
    """Ctrl-C: one word, exit code 130, and soon; the next push goes on."""
    path = export(tmp_path, "vllm")
    held = hub.fail(step, "hold")
    client = run_client(hub, tmp_path, path)
    assert held.reached.wait(60)
    os.kill(client.pid, signal.SIGINT)
    _, said = client.communicate(timeout=30)
    assert (client.returncode, said.decode().strip()) == (130, "interrupted")
    held.release.set()
    settle(hub, path)


def test_a_hub_without_xet(hub: HubServer, tmp_path: Path) -> None:
    """The client's default is Xet, which not every hub has: it fails there, and the way out is said."""
    path = export(tmp_path, "vllm")
    client = run_client(hub, tmp_path, path, HF_HUB_DISABLE_XET="0")
    _, said = client.communicate(timeout=120)
    assert client.returncode == 1
    assert "if this hub has no Xet storage: HF_HUB_DISABLE_XET=1" in said.decode()
    assert hub.repos[REPO].log() == ["initial commit"]
    settle(hub, path)


@pytest.mark.parametrize("fault", [{}, {"status": 503}, {"status": 429}], ids=str)
def test_through_xet(tmp_path: Path, fault: dict[str, object]) -> None:
    """The client's default: hf_xet stores the large files, and the commit names them by the sha256 that we gave."""
    with HubServer(tmp_path / "hub", xet=tmp_path / "xet") as hub:
        hub.tokens[TOKEN] = ("user", "write")
        path = export(tmp_path, "vllm")
        if fault:
            hub.fail("xet", **fault)  # type: ignore[arg-type]
        for _ in range(2):
            client = run_client(hub, tmp_path, path, HF_HUB_DISABLE_XET="0")
            _, said = client.communicate(timeout=120)
            assert client.returncode == 0, said.decode()
        there = hub.repos[REPO].files()
        listed = Export.open(path).manifest.files
        assert {name: there[name].sha256 for name in listed} == {name: entry.sha256 for name, entry in listed.items()}
        assert not hub.count("batch") and hub.count("commit") == 1
        stored = [file for file in (tmp_path / "xet").rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in stored) > listed["model.safetensors"].size * 0.9


def test_multipart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(tmp_path / "hub", chunk=4000) as hub:
        hub.tokens[TOKEN] = ("user", "write")
        connect(hub, tmp_path / "home", monkeypatch)
        path = export(tmp_path, "vllm")
        hub.fail("part", "reset", skip=1)
        hub.fail("part", status=500, skip=1)
        hub.fail("complete", "lost")
        push([path], repo_id=REPO)
        assert hub.count("part") > 4
        settle(hub, path)


@pytest.mark.parametrize("fault", [{"kind": "reset"}, {"status": 503}, {"kind": "slow"}])
@pytest.mark.parametrize("step", ["storage", "resolve"])
def test_pull_through_faults(hub: HubServer, tmp_path: Path, step: str, fault: dict[str, object]) -> None:
    path = export(tmp_path, "vllm")
    push([path], repo_id=REPO)
    hub.fail(step, **fault)  # type: ignore[arg-type]
    try:
        pull_check(REPO)
    except HubError as error:
        assert "\n" not in error.message
    checked = pull_check(REPO)
    for name in Export.open(path).manifest.files:
        assert (checked.path / name).read_bytes() == (path / name).read_bytes()


def test_pull_finds_corruption(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    push([path], repo_id=REPO)
    hub.fail("storage", "corrupt")
    with pytest.raises(HubError, match=r"model\.safetensors: .* another sha256"):
        pull_check(REPO)


def run_client(hub: HubServer, tmp_path: Path, path: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The command line in its own process."""
    command = [sys.executable, "-m", "lora2serve", "push", str(path), "--repo-id", REPO]
    environment = client_env(hub, tmp_path / "home2", **environment)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
