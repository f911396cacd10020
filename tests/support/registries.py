"""Registries in tests: runs and exports of real files, small enough to make hundreds; a Postgres of our own."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora2serve import Registry
from lora2serve.artifacts.run import Run
from lora2serve.system.small_files import digest
from tests.support.manifests import write_export

PROVEN = {"met": True, "engines": {"vllm": {"status": "met"}}}
PROGRAMS = Path("/usr/lib/postgresql")
INSTALL = "no PostgreSQL here: apt-get install postgresql"
SUITE = "5" * 64


def make_run(path: Path, seed: int = 0, *, base: str = "org/base", rank: int = 4, **record: Any) -> Run:
    """A finished run whose adapter is of that seed; ``record`` goes over its run.json."""
    adapter = path / "adapter"
    adapter.mkdir(parents=True)
    write_adapter(adapter, seed, base=base, rank=rank)
    (path / "eval.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (path / "recipe.yaml").write_text(
        f"model: {{path: {base}}}\ntrain: {{learning_rate: 0.0002, lora: {{rank: {rank}}}}}\n"
    )
    losses = {"tuned": {"eval_loss": 1.0 + seed / 100, "perplexity": 2.0, "tokens": 10}}
    content = {
        "name": path.name,
        "base": {"id": base, "fingerprint": {"config": "c" * 64, "tensors": base.encode().hex().ljust(64, "0")[:64]}},
        "data": {"train": {"path": "train.jsonl", "sha256": "a" * 64, "rows": 100 + seed}},
        "steps": 10, "metrics": losses, "finished": True, **record,
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(content))
    return Run(path)


def write_adapter(folder: Path, seed: int, *, base: str = "org/base", rank: int = 4) -> None:
    """A LoRA of one module, random by its seed."""
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    numbers = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{prefix}.lora_A.weight": numbers.standard_normal((rank, 8), dtype=np.float32),
        f"{prefix}.lora_B.weight": numbers.standard_normal((8, rank), dtype=np.float32),
    }
    save_file(weights, folder / "adapter_model.safetensors")


def add_export(run: Run, target: str = "vllm", *, proven: bool = True, **changes: Any) -> Path:
    """An export of the run, with the files of ``write_export``."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    record = {"path": str(run.adapter), "sha256": {name: digest(run.adapter / name)["sha256"] for name in names}}
    from lora2serve.artifacts.lineage import AdapterRecord
    from lora2serve.artifacts.manifest import ParityVerdict

    adapter = AdapterRecord.from_json(record, "adapter")
    values = {
        "run": run.name, "base": run.record.base, "adapter": adapter, "adapters": (adapter,),
        "parity": ParityVerdict.from_json(PROVEN, "parity") if proven else None, **changes,
    }  # fmt: skip
    quant = values.get("quant")
    return write_export(run.exports / (f"{target}-{quant}" if quant else target), target, **values)


def add_trial(registry: Registry, folder: Path, name: str) -> None:
    """A champion, 1, a challenger, 2, and a third version whose parity is not proven."""
    for seed in range(3):
        run = make_run(folder / f"run-{seed}", seed)
        add_export(run, proven=seed < 2)
        registry.add(run.path, name=name, unproven=True)
    registry.promote(f"{name}@1")
    registry.promote(f"{name}@2", "challenger")


def scores(folder: Path, value: float, *, suite: str = "medqa", metric: str = "acc", created: str, **more: Any) -> Path:
    """A file of scores."""
    content = {
        "format": 1, "suite": suite, "suite_sha256": more.pop("suite_sha256", SUITE), "engine": "vllm 0.32.0",
        "created": created, "metrics": {metric: {"value": value, "n": 200, **more}},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}-{metric}-{created[:10]}-{value}.json"
    path.write_text(json.dumps(content))
    return path


def forked(work: Callable[[], object]) -> int:
    """Do that in a child; its process. Of itself it ends with 0, or with 1 where the work raises."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@contextmanager
def running_postgres() -> Iterator[str]:
    """The URL of a server's empty database, of a cluster that is made for it; skipped where none is installed."""
    programs = max(PROGRAMS.glob("*/bin"), default=None) if PROGRAMS.is_dir() else None
    if programs is None:
        pytest.skip(INSTALL)
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the path of a socket may be no longer than 107 bytes
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # Postgres refuses to be root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(folder), "TZ": "UTC"}

    def call(*words: object) -> None:
        subprocess.run(list(map(str, words)), check=True, capture_output=True, env=environment, cwd=folder, **user)

    data = folder / "data"
    try:
        call(programs / "initdb", "-D", data, "-U", "lora", "-A", "trust", "-N", "-E", "UTF8")
        options = f"-c listen_addresses=127.0.0.1 -c fsync=off -c unix_socket_directories={folder} -p {port}"
        call(programs / "pg_ctl", "-D", data, "-o", options, "-w", "-l", folder / "log", "start")
        yield f"postgresql://lora@127.0.0.1:{port}/postgres"
    finally:
        if (data / "postmaster.pid").exists():
            call(programs / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def empty_database(url: str, name: str) -> str:
    """A new database on that server; its URL."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"{url.rpartition('/')[0]}/{name}"
