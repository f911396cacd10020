"""Push against the real client and a Hub of ours: what is sent, what is refused, and what stands there afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from lora2serve.artifacts.export_dir import Export
from lora2serve.cli import run as command_line
from lora2serve.errors import HubError, InputError, ParityNotMet, UsageError
from lora2serve.hub import fetch, pull_check, push
from lora2serve.progress import Silent
from lora2serve.system.small_files import digest
from tests.hub.conftest import MET, export, same
from tests.support.hub_server import HubServer
from tests.support.manifests import change_manifest
from tests.support.runs import Told

REPO = "user/demo"


def test_round_trip_of_three_kinds(hub: HubServer, tmp_path: Path) -> None:
    paths = [export(tmp_path, "vllm"), export(tmp_path, "adapter", seed=1), export(tmp_path, "gguf", "Q8_0", seed=2)]
    pushed = push(paths, repo_id=REPO)
    assert [one.repo_id for one in pushed] == [REPO, f"{REPO}-lora", f"{REPO}-GGUF"]
    for one, path in zip(pushed, paths, strict=True):
        same(hub, one.repo_id, path)
        assert hub.repos[one.repo_id].log() == [hub.repos[one.repo_id].log()[0], "initial commit"]
        checked = pull_check(one.repo_id)
        assert checked.commit == one.commit and not checked.unproven and not checked.unlisted_files
        for name in Export.open(path).manifest.files:
            assert (checked.path / name).read_bytes() == (path / name).read_bytes()
    fetched = fetch(REPO)
    assert fetched.commit == pushed[0].commit and (fetched.path / "model.safetensors").is_file()


def test_a_second_push_sends_nothing(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    first = push([path], repo_id=REPO)[0]
    before = len(hub.requests)
    again = push([path], repo_id=REPO)[0]
    assert again.commit == first.commit and not again.uploaded
    assert {request.method for request in hub.requests[before:]} <= {"GET", "HEAD"}


def test_all_types_share_one_repository(hub: HubServer, tmp_path: Path) -> None:
    small = export(tmp_path, "ollama", "Q4_K_M")
    push([small, export(tmp_path, "ollama", "Q8_0", seed=1)], repo_id=REPO)
    there = hub.repos[f"{REPO}-GGUF"].files()
    assert {"demo-Q4_K_M.gguf", "demo-Q8_0.gguf", "Modelfile", "Modelfile-Q8_0", "template", "params"} <= set(there)
    assert hub.read(there["Modelfile-Q8_0"]) == b"FROM ./demo-Q8_0.gguf\n"
    assert pull_check(f"{REPO}-GGUF").exports == ["ollama-Q4_K_M", "ollama-Q8_0"]
    push([export(tmp_path, "ollama", "Q5_0", seed=2)], repo_id=REPO)  # another type later: the first two stay
    assert pull_check(f"{REPO}-GGUF").exports == ["ollama-Q4_K_M", "ollama-Q5_0", "ollama-Q8_0"]
    assert "demo-Q4_K_M.gguf" in hub.repos[f"{REPO}-GGUF"].files()


def test_files_of_an_older_export_go(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm", **{"model-00002.safetensors": b"old shard"})
    push([path], repo_id=REPO)
    hub.add(REPO, {"notes.md": b"the user's own"})
    path = export(tmp_path, "vllm", seed=5)
    pushed = push([path], repo_id=REPO)[0]
    assert pushed.deleted == ["model-00002.safetensors"]
    assert hub.read(hub.repos[REPO].files()["notes.md"]) == b"the user's own"
    assert pull_check(REPO).unlisted_files == ["notes.md"]


def test_single_repository(hub: HubServer, tmp_path: Path) -> None:
    push(
        [export(tmp_path, "vllm"), export(tmp_path, "adapter"), export(tmp_path, "gguf", "Q8_0")],
        repo_id=REPO,
        single_repo=True,
    )
    assert set(hub.repos) == {REPO}
    assert {"config.json", "adapter/adapter_config.json", "demo-Q8_0.gguf"} <= set(hub.repos[REPO].files())
    assert pull_check(REPO).exports == ["vllm", "adapter", "gguf-Q8_0"]


def test_only_what_the_manifest_names(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    (path / ".tmpAbCdEf").write_bytes(b"litter")
    (path / "modeling_evil.py").write_text("import os")
    (tmp_path / "outside").write_bytes(b"secret")
    (path / "link").symlink_to(tmp_path / "outside")
    push([path], repo_id=REPO)
    same(hub, REPO, path)


def test_a_listed_link_is_refused(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    content = (path / "config.json").read_bytes()
    (tmp_path / "outside").write_bytes(content)  # the very bytes, so only the link itself is wrong
    (path / "config.json").unlink()
    (path / "config.json").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="symbolic link"):
        push([path], repo_id=REPO)
    assert not hub.repos


def test_every_problem_is_told_and_nothing_sent(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm", **{"tokenizer.json": b"{}", "code.py": b"pass", "notes.txt": b"hf_" + b"x" * 34})
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    (path / "config.json").unlink()
    (path / "tokenizer.json").write_text("{ }")
    with pytest.raises(InputError) as caught:
        push([path], repo_id=REPO)
    told = caught.value.message
    for words in ("model.safetensors: content changed", "config.json: missing", "tokenizer.json: 3 bytes, expected 2",
                  "code.py: Python code", "notes.txt: holds something shaped like a Hugging Face token"):  # fmt: skip
        assert words in told
    assert "hf_" not in told
    assert not hub.repos and not hub.count("create")


def test_a_manifest_cannot_name_files_outside(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    manifest = json.loads((path / "lora2serve.json").read_text())
    manifest["files"]["../outside"] = digest(outside)
    (path / "lora2serve.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="expected a path inside the export"):
        push([path], repo_id=REPO)


@pytest.mark.parametrize(
    ("parity", "words"),
    [
        (None, "was not run"),
        pytest.param({**MET, "met": False}, "was not met", marks=pytest.mark.slow),
        ({"met": True, "engines": {"vllm": {"status": "missed"}}}, "was not met"),  # what it says of itself is not it
        ({"met": True, "engines": {"vllm": {"status": "missing"}}}, "was run in no engine"),
        pytest.param({"met": True}, "was run in no engine", marks=pytest.mark.slow),
    ],
)
def test_unproven(hub: HubServer, tmp_path: Path, parity: object, words: str) -> None:
    path = export(tmp_path, "vllm", parity=parity)
    with pytest.raises(ParityNotMet, match=words):
        push([path], repo_id=REPO)
    assert not hub.requests
    push([path], repo_id=REPO, allow_unproven=True)
    assert (
        f"Pushed without proof that it answers like the trained model (vllm: parity {words})"
        in hub.read(hub.repos[REPO].files()["README.md"]).decode()
    )
    assert pull_check(REPO).unproven == {"vllm": f"parity {words}"}


@pytest.mark.parametrize("parity", [{**MET, "met": "yes"}, {**MET, "engines": ["vllm"]}, "met"])
def test_a_damaged_verdict_is_none(hub: HubServer, tmp_path: Path, parity: object) -> None:
    path = export(tmp_path, "vllm")
    content = json.loads((path / "lora2serve.json").read_text())
    (path / "lora2serve.json").write_text(json.dumps(content | {"parity": parity}))
    with pytest.raises(InputError, match=r"lora2serve\.json: parity"):
        push([path], repo_id=REPO, allow_unproven=True)
    assert not hub.requests


def test_dry_run_sends_nothing(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    planned = push([path], repo_id=REPO, dry_run=True)[0]
    assert set(planned.uploaded) == {*Export.open(path).manifest.files, "lora2serve.json", "README.md"}
    assert planned.dry_run and planned.commit is None and "base_model: acme/base-1b" in planned.card
    assert not hub.repos and {request.method for request in hub.requests} <= {"GET", "HEAD"}
    done = push([path], repo_id=REPO)[0]
    assert (done.uploaded, done.card) == (planned.uploaded, planned.card)


def test_dry_run_of_what_is_not_proven(hub: HubServer, tmp_path: Path) -> None:
    """The card is shown, which says so too, and why the push would be refused."""
    path, progress = export(tmp_path, "vllm", parity=None), Told()
    (planned,) = push([path], repo_id=REPO, dry_run=True, progress=progress)
    assert "Pushed without proof" in planned.card and not hub.repos
    assert progress.warnings == [f"{path}: parity was not run: the push would be refused"]
    push([path], repo_id=REPO, dry_run=True, allow_unproven=True, progress=(allowed := Told()))
    assert allowed.warnings == [], "the control"


def test_dry_run_without_a_network(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push([export(tmp_path, "vllm")], repo_id=REPO, dry_run=True)[0].uploaded
    assert not hub.requests


def test_branch_private_and_pull_request(hub: HubServer, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    push([path], repo_id=REPO, private=True, revision="v2")
    assert hub.repos[REPO].private
    same(hub, REPO, path, "v2")
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    pushed = push([path], repo_id=REPO, create_pr=True)[0]
    assert pushed.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    same(hub, REPO, path, "refs/pr/1")
    push([path], repo_id=REPO, create_pr=True)  # again: the same pull request
    assert len(hub.repos[REPO].pulls) == 1


def test_private_is_not_pushed_into_public(hub: HubServer, tmp_path: Path) -> None:
    hub.create(REPO)
    with pytest.raises(HubError, match="exists and is public"):
        push([export(tmp_path, "vllm")], repo_id=REPO, private=True)
    assert hub.repos[REPO].log() == ["initial commit"]


@pytest.mark.parametrize("at_once", [20, pytest.param(0, marks=pytest.mark.slow)])
def test_many_files_are_one_commit(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """More than the client asks about at once: 256, or fewer here."""
    from huggingface_hub import _commit_api

    chunks, asked = _commit_api.chunk_iterable, []

    def some(items: Iterable[object], chunk_size: int) -> Iterator[Iterable[object]]:
        asked.append(chunk_size)
        return chunks(items, at_once or chunk_size)

    monkeypatch.setattr(_commit_api, "chunk_iterable", some)
    kinds, count = ("safetensors", "json"), (at_once or 256) // 2 + 2
    path = export(tmp_path, "vllm", **{f"shard-{n:03}.{kind}": b"%d" % n for n in range(count) for kind in kinds})
    push([path], repo_id=REPO)
    same(hub, REPO, path)
    assert len(hub.repos[REPO].log()) == 2 and not hub.repos[REPO].pulls
    assert min(asked) == 256, "as many as it takes at once"


def test_the_repositorys_gitignore_drops_nothing(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {".gitignore": b"*.json\n*.safetensors\n"})
    path = export(tmp_path, "vllm")
    push([path], repo_id=REPO)
    assert {*Export.open(path).manifest.files} <= set(hub.repos[REPO].files())


def test_manifest_without_paths_of_this_machine(hub: HubServer, tmp_path: Path) -> None:
    push([export(tmp_path, "vllm"), export(tmp_path, "gguf", "Q8_0"), export(tmp_path, "gguf", "Q4_K_M")], repo_id=REPO)
    for name in (REPO, f"{REPO}-GGUF"):
        text = hub.read(hub.repos[name].files()["lora2serve.json"]).decode()
        assert "/home/someone" not in text and json.loads(text)["base"]["path"] == "base-1b"


@pytest.mark.parametrize("repo_id", ["demo", "a b/c", "user/..", "user/x/y"])
def test_repo_ids(hub: HubServer, tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(UsageError):
        push([export(tmp_path, "vllm")], repo_id=repo_id)


def test_no_token(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token") as caught:
        push([export(tmp_path, "vllm")], repo_id=REPO)
    assert "hf auth login" in caught.value.hint


def test_another_namespace(hub: HubServer, tmp_path: Path) -> None:
    """A typo in the owner: the Hub only says 403, which of several things it is."""
    with pytest.raises(HubError, match=r"your token is user's, .* of usr \(did you mean 'user'\?\)") as caught:
        push([export(tmp_path, "vllm")], repo_id="usr/demo")
    assert "--repo-id user/demo" in caught.value.hint and not hub.repos


def test_pushing_without_a_network(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    path = export(tmp_path, "vllm")
    with monkeypatch.context() as broken:
        broken.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubError, match=r"pushing to user/demo: http://127.0.0.1:9 cannot be reached"):
            push([path], repo_id=REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="pushing to user/demo: HF_HUB_OFFLINE is set"):
        push([path], repo_id=REPO)


def test_a_base_that_only_this_machine_knows(hub: HubServer, tmp_path: Path) -> None:
    told: list[str] = []

    class Words(Silent):
        def warn(self, text: str) -> None:
            told.append(text)

    for base in ("/home/someone/base-1b", "acme/base-1b"):
        path = export(tmp_path / base.strip("/").replace("/", "-"), "adapter")
        change_manifest(path, served_base=base)
        push([path], repo_id=REPO, progress=Words(), dry_run=True)
    assert len(told) == 1 and "--served-base" in told[0]


def test_what_a_push_without_names_takes(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of runs/latest by the command line; of two GGUF files of one name, Ollama's."""
    run = tmp_path / "runs" / "demo"
    made = [export(run / "exports", *what) for what in (("vllm",), ("adapter",), ("gguf", "Q8_0"), ("gguf", "Q4_K_M"))]
    made.append(export(run / "exports", "ollama", "Q4_K_M", seed=9))
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "run.json").write_text("{}")
    (tmp_path / "runs" / "latest").symlink_to("demo")
    monkeypatch.chdir(tmp_path)
    assert command_line(["push", "--repo-id", REPO, "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert not hub.repos and {request.method for request in hub.requests} <= {"GET", "HEAD"}, "nothing is sent"
    assert "one commit, 5 files" in err and "library_name: peft" in out
    assert command_line(["push", "--repo-id", REPO]) == 0
    out, err = capfd.readouterr()
    assert out.split() == [f"{hub.url}/{REPO}{suffix}" for suffix in ("", "-lora", "-GGUF")]
    assert "gguf-Q4_K_M: not pushed: its GGUF differs from that of runs/demo/exports/ollama-Q4_K_M" in err
    assert pull_check(f"{REPO}-GGUF").exports == ["gguf-Q8_0", "ollama-Q4_K_M"]
    with pytest.raises(UsageError, match=r"its demo-Q4_K_M.gguf differs from that of another export"):
        push(made, repo_id=f"{REPO}-2")


@pytest.mark.parametrize(
    "content",
    [b"no json", b'{"format": 1}', b'{"format": 1, "exports": {"a": 1}, "files": {}}',
     b'{"format": 1, "target": "vllm", "files": {"../x": {"sha256": "a", "size": 1}}}',
     *(pytest.param(content, marks=pytest.mark.slow) for content in (
         b"[1]", b'{"format": 1, "files": []}', b'{"format": 1, "exports": [], "files": {}}',
         b'{"format": 1, "target": "vllm", "files": {"x": 1}}'))],
)  # fmt: skip
def test_a_damaged_manifest_over_there(hub: HubServer, tmp_path: Path, content: bytes) -> None:
    """Someone edited it: pull-check says so in one line, and a push puts it right."""
    hub.add(REPO, {"lora2serve.json": content})
    with pytest.raises(HubError, match=r"user/demo: damaged manifest: lora2serve\.json: ") as caught:
        pull_check(REPO)
    assert "\n" not in caught.value.message
    path = export(tmp_path, "vllm")
    push([path], repo_id=REPO)
    same(hub, REPO, path)
    assert pull_check(REPO).exports == ["vllm"]
