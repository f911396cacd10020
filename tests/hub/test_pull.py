"""Pull by name: only what is needed, the commit on record, and one line for every failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora2serve.api.inspect_path import InspectedExports, inspect
from lora2serve.errors import HubError, InputError
from lora2serve.hub import fetch, pin_data, pull_check, push
from tests.hub.conftest import TOKEN, client_env, export
from tests.support.hub_server import HubServer
from tests.support.manifests import change_manifest
from tests.support.tiny import make_adapter, make_model

pytestmark = pytest.mark.engine

REPO = "org/model"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "README.md": b"# it"}
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"boom",
    "original/consolidated.00.pth": b"x",
    "tf_model.h5": b"x",
}


def test_only_what_is_needed(hub: HubServer) -> None:
    hub.add(REPO, {**FILES, **OTHERS})
    found = fetch(REPO)
    names = {path.name for path in found.path.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {name.rsplit("/", 1)[-1] for name in OTHERS}
    assert found.commit == hub.repos[REPO].refs["main"]


def test_revisions(hub: HubServer) -> None:
    first = hub.add(REPO, FILES)
    hub.add(REPO, {"config.json": b'{"new": 1}'})
    assert json.loads((fetch(REPO).path / "config.json").read_text()) == {"new": 1}
    old = fetch(f"{REPO}@{first.oid}")
    assert (old.commit, (old.path / "config.json").read_text()) == (first.oid, "{}")
    with pytest.raises(HubError, match=r"no revision 'mian'.*did you mean 'main'"):
        fetch(f"{REPO}@mian")


def test_offline_takes_the_cache(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(REPO, FILES)
    online = fetch(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert fetch(REPO).path == online.path
    with pytest.raises(HubError, match="no complete copy in the cache, and HF_HUB_OFFLINE is set") as caught:
        fetch("org/other")
    assert "hf download org/other" in caught.value.hint
    assert len(hub.requests) == asked


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(HubError, match="cannot be reached") as caught:
        fetch("org/other")
    assert "network" in caught.value.hint
    assert "\n" not in caught.value.message


def test_gated_private_and_missing(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", FILES)
    hub.repos["org/gated"].gated = True
    hub.add("other/private", FILES)
    hub.repos["other/private"].private = True
    for name in ("other/private", "org/nothing"):
        with pytest.raises(HubError, match="no such repository, or a private one"):
            fetch(name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="gated, and there is no token") as caught:
        fetch("org/gated")
    assert "hf auth login" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="gated, and your token has no access") as caught:
        fetch("org/gated")
    assert f"ask for access at {hub.url}/org/gated" in caught.value.hint
    hub.repos["org/gated"].granted.add("user")
    assert (fetch("org/gated").path / "config.json").is_file()


def test_half_a_download_is_not_taken_for_a_whole_one(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line broke for good in the second file: offline says so, and online goes on."""
    from huggingface_hub import constants

    hub.add(REPO, FILES)
    broken = hub.fail("resolve", status=404, times=1, skip=3)
    with pytest.raises(HubError):
        fetch(REPO)
    assert broken.times == 0
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="no complete copy"):
            fetch(REPO)
    assert {path.name for path in fetch(REPO).path.iterdir()} == set(FILES)


def test_inspect_what_was_pushed(hub: HubServer, tmp_path: Path) -> None:
    """By its Hub id: what it is, and the command that verifies it; also where several share a repository."""
    push(
        [export(tmp_path, "gguf", kind) for kind in ("Q8_0", "Q4_K_M")] + [export(tmp_path, "vllm")],
        repo_id="user/demo",
    )
    for name in ("user/demo", "user/demo-GGUF"):
        facts = inspect(fetch(name).path)
        commit = hub.repos[name].refs["main"]
        assert facts.pulled_from == f"{name}@{commit}" and not facts.problems
        assert pull_check(f"{name}@{commit}").commit == commit
    assert isinstance(facts, InspectedExports)
    assert [export.quant for export in facts.exports] == ["Q8_0", "Q4_K_M"]


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "a/b/c", "nothing/"])
def test_a_path_that_is_not_there(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        fetch(name)
    assert not hub.requests


def test_export_with_nothing_local(hub: HubServer, tmp_path: Path) -> None:
    """``lora2serve export user/adapter``: the base is found from the adapter's config."""
    base = make_model(tmp_path / "made" / "base")
    adapter = make_adapter(tmp_path / "made" / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    for name, path in (("org/base", base), ("user/adapter", adapter)):
        hub.add(name, {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()})
    here = tmp_path / "here"
    here.mkdir()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):  # the second time from the cache alone
        asked = len(hub.requests)
        command = [sys.executable, "-m", "lora2serve", "export", "user/adapter", "-t", "vllm", "--overwrite"]
        done = subprocess.run(
            command, cwd=here, env=client_env(hub, tmp_path / "home2", **environment), capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made = Path(done.stdout.strip())
        assert made == here / "exports" / "adapter" / "vllm", "called by its name, and not by its commit"
        assert not environment or len(hub.requests) == asked
    about = json.loads((made / "lora2serve.json").read_text())
    assert (about["base"]["id"], about["base"]["revision"]) == ("org/base", hub.repos["org/base"].refs["main"])
    assert (about["adapter"]["id"], about["adapter"]["revision"]) == (
        "user/adapter",
        hub.repos["user/adapter"].refs["main"],
    )
    assert about["name"] == "adapter"


DATA = "datasets/org/data"
PINNED = "from lora2serve.hub import pin_data; from lora2serve.data import data_sets; import json, sys;" \
         "print(json.dumps([{'path': r.path, 'sha256': r.sha256, 'rows': len(r.rows), 'revision': r.revision, 'row': r.rows[0].json()} for r in [data_sets.read(name, 'train', pin_data) for name in sys.argv[1:]]]))"  # fmt: skip


def read_data(hub: HubServer, home: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``data_sets.read`` by the real ``datasets`` in its own process, as ``train`` calls it."""
    return subprocess.run(
        [sys.executable, "-c", PINNED, *names],
        env=client_env(hub, home, **environment),
        capture_output=True,
        text=True,
        check=False,
    )


def test_data_sets_by_name_and_revision(hub: HubServer, tmp_path: Path) -> None:
    """The commit is on record; offline, another revision than the one in the cache is refused and not mistaken."""

    def rows(word: str) -> dict[str, bytes]:
        return {"train.jsonl": json.dumps({"prompt": "which", "completion": word}).encode()}

    first, second = hub.add(DATA, rows("first")), hub.add(DATA, rows("second"))
    home = tmp_path / "home2"
    done = read_data(hub, home, f"org/data@{first.oid}", "org/data")
    assert done.returncode == 0, done.stderr
    older, newest = json.loads(done.stdout)
    assert (newest["revision"], newest["row"]["completion"]) == (second.oid, "second")
    assert (older["revision"], older["row"]["completion"]) == (first.oid, "first")
    done = read_data(hub, home, "org/data", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["revision"] == second.oid
    other = read_data(hub, home, "org/data@v9", HF_HUB_OFFLINE="1")
    assert "org/data@v9: no complete copy in the cache, and HF_HUB_OFFLINE is set" in other.stderr
    unknown = read_data(hub, home, f"org/data@{'0' * 40}", HF_HUB_OFFLINE="1")
    assert "expected 0000" in unknown.stderr, unknown.stdout + unknown.stderr


def test_data_sets_that_cannot_be_had(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(DATA, {"train.jsonl": b"{}"})
    with pytest.raises(HubError, match=r"org/dota: no such data set, or a private one; nor is there a local"):
        pin_data("org/dota")
    with pytest.raises(HubError, match=r"org/data: no revision 'mian' \(did you mean 'main'\?\)"):
        pin_data("org/data@mian")
    with pytest.raises(InputError, match="no such directory"):
        pin_data("./data/train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets" / "train").mkdir(parents=True)
    with pytest.raises(HubError, match=r"sets/trian: no such directory \(did you mean 'train'\?\)"):
        pin_data("sets/trian")


def test_serve_takes_a_revision(tmp_path: Path) -> None:
    """``--base org/name@revision``, and a base that went from the cache: by id and the commit that was trained on."""
    from lora2serve.serving import server

    path = export(tmp_path, "adapter")
    change_manifest(path, rank=4, served_base="acme/base-1b")
    for base, expected in (("org/base@v2", ("org/base", "v2")), (None, ("acme/base-1b", "0" * 40))):
        command = server.plan([path], server.ServeOptions(base=base)).command
        assert (command[command.index("--model") + 1], command[command.index("--revision") + 1]) == expected
