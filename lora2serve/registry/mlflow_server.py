"""A tracking server of MLflow by its published REST API: registered models, their versions, runs, files.

MLflow's own package is not needed for it, which would take other versions of libraries than ours with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from lora2serve.errors import UsageError
from lora2serve.progress import Advance
from lora2serve.system.http import HttpClient, HttpStatus
from lora2serve.system.json_values import Json, JsonValue, at, objects

API = "/api/2.0/mlflow"
FILES = "/api/2.0/mlflow-artifacts/artifacts"
PROXIED = "mlflow-artifacts"  # the scheme of files that the server itself takes
KEY = "MLFLOW_TRACKING_TOKEN"
PATIENCE = 600.0  # seconds: a server answers an upload once the file is in its own store, which may be far away
PAGE = 200  # versions in one answer
NOT_FOUND = 404


@dataclass(frozen=True)
class RemoteVersion:
    """A version there: its number, the run that it is of, where its files lie, its tags."""

    number: str
    run_id: str
    source: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class RemoteModel:
    """A registered model: its tags, and its aliases with the number of the version each."""

    tags: Mapping[str, str]
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class Measurement:
    """One value of a metric, and when it was measured."""

    metric: str
    value: float
    created: str  # as registries have times


class MlflowServer:
    """One server; every method raises HttpError where it refuses, or is not there."""

    def __init__(self, address: str) -> None:
        hint = "check the address, and that `mlflow server` runs there"
        self._http = HttpClient(address, patience=PATIENCE, key_variable=KEY, hint=hint)
        self.address = self._http.address

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def model(self, name: str) -> RemoteModel | None:
        """The registered model of that name; None where there is none."""
        answer = self._find("registered-models/get", name=name)
        if answer is None:
            return None
        found = at(answer, "registered_model")
        aliases = {str(one["alias"]): str(one["version"]) for one in objects(at(found, "aliases"))}
        return RemoteModel(_tags(at(found, "tags")), aliases)

    def create_model(self, name: str, tags: Mapping[str, str]) -> None:
        """Register an empty model."""
        self._post("registered-models/create", {"name": name, "tags": _pairs(tags)})

    def versions(self, name: str) -> list[RemoteVersion]:
        """All versions of a model."""
        found, token = [], ""
        while True:
            query = {"filter": f"name='{name}'", "max_results": str(PAGE), **({"page_token": token} if token else {})}
            answer = self._get("model-versions/search", query)
            found += [_version(one) for one in objects(at(answer, "model_versions"))]
            token = str(at(answer, "next_page_token") or "")
            if not token:
                return found

    def create_version(self, name: str, run_id: str, source: str, tags: Mapping[str, str], note: str) -> RemoteVersion:
        """Make a version of a model out of the files of a run; its number is the server's."""
        body = {"name": name, "run_id": run_id, "source": source, "tags": _pairs(tags), "description": note}
        return _version(_object(at(self._post("model-versions/create", body), "model_version")))

    def set_tag(self, name: str, number: str, key: str, value: str) -> None:
        """Write a tag of a version, over the one that is there."""
        self._post("model-versions/set-tag", {"name": name, "version": number, "key": key, "value": value})

    def set_alias(self, name: str, alias: str, number: str) -> None:
        """Let an alias point to a version."""
        self._post("registered-models/alias", {"name": name, "alias": alias, "version": number})

    def remove_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        self._http.call("DELETE", f"{API}/registered-models/alias", {"name": name, "alias": alias})

    def experiment(self, name: str) -> str:
        """The id of the experiment of that name, which is made where there is none."""
        answer = self._find("experiments/get-by-name", experiment_name=name)
        if answer is not None:
            return str(at(answer, "experiment", "experiment_id"))
        return str(at(self._post("experiments/create", {"name": name}), "experiment_id"))

    def run_with(self, experiment: str, key: str, value: str) -> tuple[str, str] | None:
        """The id of the run that has that tag, and where its files lie; None where no run has it."""
        body = {"experiment_ids": [experiment], "filter": f"tags.`{key}` = '{value}'", "max_results": 1}
        runs = objects(at(self._post("runs/search", body), "runs"))
        return _run(runs[0]) if runs else None

    def create_run(self, experiment: str, name: str, created: str, tags: Mapping[str, str]) -> tuple[str, str]:
        """A new run, that began when the version was made: its id, and where its files go."""
        body = {
            "experiment_id": experiment, "run_name": name, "start_time": _milliseconds(created), "tags": _pairs(tags),
        }  # fmt: skip
        return _run(_object(at(self._post("runs/create", body), "run")))

    def log(self, run_id: str, params: Mapping[str, str], metrics: Sequence[Measurement]) -> None:
        """Parameters and metrics of a run; what is there already stays the same."""
        values: list[dict[str, object]] = [
            {"key": one.metric, "value": one.value, "timestamp": _milliseconds(one.created), "step": 0}
            for one in metrics
        ]
        for start in range(0, max(1, len(values)), 500):  # the server takes 1,000 in one request
            body = {"run_id": run_id, "metrics": values[start : start + 500], "params": _pairs(params)}
            self._post("runs/log-batch", body)

    def finish(self, run_id: str, created: str) -> None:
        """Mark a run as ended."""
        self._post("runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": _milliseconds(created)})

    def upload(self, place: str, path: str, file: Path, advance: Advance) -> None:
        """Send a file to ``path`` below where the files of a run lie."""
        self._http.upload(f"{FILES}{self._folder(place)}/{quote(path)}", file, advance, method="PUT")

    def write(self, place: str, path: str, content: Mapping[str, object]) -> None:
        """As ``upload``, of JSON."""
        self._http.send("PUT", f"{FILES}{self._folder(place)}/{quote(path)}", content)

    def _folder(self, place: str) -> str:
        """The path of a run's files behind the server's own address for them."""
        url = urlsplit(place)
        if url.scheme != PROXIED or url.netloc:
            raise UsageError(
                f"{self.address}: keeps files at {url.scheme or 'a folder'}, where only its own clients write",
                "start it as `mlflow server --serve-artifacts`, and delete the experiment that was made without",
            )
        return quote(url.path)

    def _get(self, path: str, query: Mapping[str, str]) -> Json:
        return self._http.call("GET", f"{API}/{path}?{urlencode(query)}")

    def _find(self, path: str, **query: str) -> Json | None:
        """The answer; None where the server knows no such thing. Another server's 404 is an error."""
        try:
            return self._get(path, query)
        except HttpStatus as error:
            if error.status == NOT_FOUND and next(iter(query.values())) in error.reply:  # it names what is missing
                return None
            raise

    def _post(self, path: str, body: Mapping[str, object]) -> Json:
        return self._http.call("POST", f"{API}/{path}", body)


def _version(value: Json) -> RemoteVersion:
    return RemoteVersion(
        str(value.get("version")), str(value.get("run_id")), str(value.get("source")), _tags(value.get("tags"))
    )


def _run(value: Json) -> tuple[str, str]:
    return str(at(value, "info", "run_id")), str(at(value, "info", "artifact_uri"))


def _object(value: JsonValue) -> Json:
    return value if isinstance(value, dict) else {}


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _tags(value: JsonValue) -> dict[str, str]:
    return {str(one.get("key")): str(one.get("value", "")) for one in objects(value)}


def _milliseconds(created: str) -> int:
    moment = datetime.strptime(created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return int(moment.timestamp() * 1000)
