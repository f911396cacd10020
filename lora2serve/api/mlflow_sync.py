"""Versions of a registry on a tracking server of MLflow: as versions of a registered model, with their files.

What a version there says of itself is in its tags. They are written last, and what they say otherwise than the registry
is sent again: a sync that was killed is completed by the next one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from lora2serve.api.registry_sync import MLFLOW, Changes, Synced, unfit, unset_aliases
from lora2serve.errors import UsageError
from lora2serve.progress import Progress
from lora2serve.registry.mlflow_server import Measurement, MlflowServer, RemoteVersion

if TYPE_CHECKING:
    from lora2serve.api.version_registry import Registry
    from lora2serve.registry.version_record import Version

PREFIX = "lora2serve."
NAME, VERSION, SHA256, EXPORTS, SCORES = (
    f"{PREFIX}{key}" for key in ("name", "version", "sha256", "exports", "scores")
)
FOLDER = "model"  # of a run, in which the files of its version lie
DESCRIPTION = "MLmodel"  # the file by which MLflow knows a model
ALIAS = re.compile(r"(?!(?:latest|v\d+)\Z)[\w-]+", re.I)  # what an alias may be called there
LONGEST = 5000  # characters of a tag there


def sync(registry: Registry, name: str, address: str, progress: Progress, changes: Changes) -> Synced:
    """Make a server say what the registry says of one name.

    Raises UsageError where that name is taken there by something else, HttpError for what the server refuses.
    """
    with closing(MlflowServer(address)) as server:
        versions = registry.versions(name)
        there = _versions_there(server, name, changes)
        pushed, left_out, numbers = [], [], dict[int, str]()
        for version in versions:
            remote = there.get(version.reference)
            if remote is None and (reason := unfit(version)):
                left_out.append(f"{version.reference}: {reason}")
                continue
            if remote is None:
                send = partial(_create, registry, server, version, progress)
                remote = changes.make(f"send {version.reference}", send)
                pushed.append(version.reference)
            elif remote.tags.get(SHA256) != version.sha256:
                raise UsageError(
                    f"{server.address}: its {version.reference} has another content, so it is of another registry",
                    f"`lora2serve registry add ... --name` of another name, and sync that; or remove {name} there",
                )
            elif new := _new(version, remote):
                update = partial(_update, registry, server, version, remote, progress)
                changes.make(f"update {version.reference}: {', '.join(new)}", update)
            numbers[version.number] = remote.number if remote else ""  # in a dry run it has none yet
        moved = list(_move(registry, server, name, numbers, progress, changes))
        return Synced(
            f"{MLFLOW}{server.address}", tuple(pushed), tuple(moved), tuple(left_out), tuple(changes.lines),
            changes.dry_run,
        )  # fmt: skip


def _versions_there(server: MlflowServer, name: str, changes: Changes) -> Mapping[str, RemoteVersion]:
    """Ours by their reference; the model is made where there is none, and left alone where it is somebody else's."""
    model = server.model(name)
    if model is None:
        changes.make(f"register {name}", partial(server.create_model, name, {NAME: name}))
        return {}
    if model.tags.get(NAME) != name:
        raise UsageError(
            f"{server.address}: a registered model {name} is there, and not from lora2serve",
            f"rename it there; or give it the tag {NAME}={name}, and versions are added to it",
        )
    versions = sorted(server.versions(name), key=lambda version: -int(version.number))
    return {version.tags[VERSION]: version for version in versions if VERSION in version.tags}


def _create(registry: Registry, server: MlflowServer, version: Version, progress: Progress) -> RemoteVersion:
    """A run with the files and scores, and a version of it; the run of a sync that was killed is taken again."""
    known = {VERSION: version.reference, SHA256: version.sha256}
    experiment = server.experiment(f"lora2serve/{version.name}")
    run_id, place = server.run_with(experiment, SHA256, version.sha256) or server.create_run(
        experiment, version.folder, version.created, known
    )
    _send_files(registry, server, version, place, progress)
    server.write(place, f"{FOLDER}/{DESCRIPTION}", _description(version, run_id))
    server.log(run_id, _params(version), ())
    server.finish(run_id, version.added)
    tags = {**known, EXPORTS: " ".join(_proven(version))}
    remote = server.create_version(version.name, run_id, f"{place}/{FOLDER}", tags, version.note)
    _update(registry, server, version, remote, progress)
    return remote


def _new(version: Version, remote: RemoteVersion) -> list[str]:
    """What is there to be written, by the tags that say so: exports, scores, state ..."""
    tags = {**_tags(version), EXPORTS: _exports_there(version, remote)}
    return [key.removeprefix(PREFIX) for key, value in tags.items() if remote.tags.get(key) != value]


def _exports_there(version: Version, remote: RemoteVersion) -> str:
    """The tag that says which are there, once those that came later are."""
    sent = remote.tags.get(EXPORTS, "").split()
    return " ".join([*sent, *(label for label in _proven(version) if label not in sent)])


def _update(
    registry: Registry, server: MlflowServer, version: Version, remote: RemoteVersion, progress: Progress
) -> None:
    """Exports and scores that came later, and whatever its tags say otherwise."""
    tags = _tags(version)
    sent = remote.tags.get(EXPORTS, "").split()
    for label in _proven(version):
        if label not in sent:
            place = remote.source.removesuffix(f"/{FOLDER}")
            _send_files(registry, server, version, place, progress, below=f"exports/{label}/")
    if remote.tags.get(SCORES) != tags.get(SCORES):
        server.log(remote.run_id, {}, [Measurement(one.name, one.value, one.created) for one in version.scores])
    for key, value in {**tags, EXPORTS: _exports_there(version, remote)}.items():
        if remote.tags.get(key) != value:
            server.set_tag(version.name, remote.number, key, value)


def _send_files(
    registry: Registry, server: MlflowServer, version: Version, place: str, progress: Progress, *, below: str = ""
) -> None:
    files = {path: file for path, file in registry.files(version.reference).items() if path.startswith(below)}
    total = sum(file.stat().st_size for file in files.values())
    with progress.track(f"send {version.reference}", total, "bytes") as advance:
        for path, file in files.items():
            server.upload(place, f"{FOLDER}/{path}", file, advance)


def _move(
    registry: Registry, server: MlflowServer, name: str, numbers: Mapping[int, str], progress: Progress,
    changes: Changes,
) -> Iterator[str]:  # fmt: skip
    """The aliases that pointed elsewhere, and those that are none any more."""
    model = server.model(name)
    before, own = model.aliases if model else {}, {remote: number for number, remote in numbers.items()}
    for alias in sorted(unset_aliases(registry, name) & before.keys()):
        yield changes.move(name, alias, own.get(before[alias]), None, partial(server.remove_alias, name, alias))
    for alias, number in registry.aliases(name).items():
        if not ALIAS.fullmatch(alias):
            progress.warn(f"{name}@{alias}: not sent: MLflow has no alias of that name")
        elif number in numbers and before.get(alias) != numbers[number]:
            old = own.get(before.get(alias, "-"))
            yield changes.move(name, alias, old, number, partial(server.set_alias, name, alias, numbers[number]))


def _proven(version: Version) -> list[str]:
    """The exports that are sent."""
    return [export.name for export in version.exports if not export.unproven]


def _tags(version: Version) -> dict[str, str]:
    """What is written on a version, without what is not known; which exports are there is written beside it."""
    scores = "\n".join(sorted(f"{one.name} {one.value!r} {one.created}" for one in version.scores))
    values = {
        "version": version.reference, "sha256": version.sha256, "state": version.state, "domain": version.domain,
        "task": version.task, "author": version.author, "created": version.created, "run": version.run,
        "base": version.base, "base_sha256": version.base_sha256, "data_sha256": " ".join(version.data_sha256),
        "scores": hashlib.sha256(scores.encode()).hexdigest() if scores else "",
    }  # fmt: skip
    return {f"{PREFIX}{key}": value[:LONGEST] for key, value in values.items() if value}


def _params(version: Version) -> dict[str, str]:
    values = {
        "base": version.base, "method": version.method, "rank": version.rank, "alpha": version.alpha,
        "learning_rate": version.learning_rate, "steps": version.steps, "rows": version.rows,
        "quantization": version.quantization,
    }  # fmt: skip
    return {key: str(value) for key, value in values.items() if value not in (None, "")}


def _description(version: Version, run_id: str) -> dict[str, object]:
    """MLflow's own description of a model, of a kind that lora2serve alone serves: the directory of a version."""
    facts = {"version": version.reference, "sha256": version.sha256, "base": version.base}
    time = f"{version.created[:10]} {version.created[11:19]}.000000"
    return {"artifact_path": FOLDER, "run_id": run_id, "utc_time_created": time, "flavors": {"lora2serve": facts}}
