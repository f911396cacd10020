"""Tracking servers of MLflow: a real one in an environment of its own, and the endpoints that a sync calls, in memory.

Both are held by the same tests. The small one refuses what the real one refuses: names that are taken, aliases of
versions that are not there, parameters that change.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpx2

from tests.support.environments import end_group

MLFLOW = "mlflow==3.17.2"
FILES = "/api/2.0/mlflow-artifacts/artifacts/"


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class SmallMlflow:
    """Models, versions, runs and files of a server; ``failing`` are endpoints that answer 503, so many times each."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        self.experiments: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []

    def answer(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        name = path.removeprefix("/api/2.0/mlflow/")
        self.called(name)
        work = getattr(self, f"{method.lower()}_{re.sub('[/-]', '_', name)}", None)
        if work is None:
            raise Refused(404, "Not Found")
        return dict(work(body) or {})

    def upload(self, path: str, content: bytes) -> dict[str, Any]:
        self.called("upload")
        self.files[path] = content
        return {}

    def called(self, name: str) -> None:
        self.calls.append(name)
        if self.failing.get(name, 0):
            self.failing[name] -= 1
            raise Refused(503, "try again")

    def model(self, name: str) -> dict[str, Any]:
        if name not in self.models:
            raise Refused(404, f"Registered Model with name={name} not found")
        return self.models[name]

    def version(self, body: dict[str, Any]) -> dict[str, Any]:
        for one in self.model(body["name"])["versions"]:
            if one["version"] == body["version"]:
                return dict(one)
        raise Refused(404, f"Model Version (name={body['name']}, version={body['version']}) not found")

    def run(self, run_id: str) -> dict[str, Any]:
        return next(run for run in self.runs if run["info"]["run_id"] == run_id)

    def get_registered_models_get(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self.model(body["name"])
        return {"registered_model": {key: value for key, value in model.items() if key != "versions"}}

    def post_registered_models_create(self, body: dict[str, Any]) -> None:
        if body["name"] in self.models:
            raise Refused(400, f"Registered Model (name={body['name']}) already exists.")
        self.models[body["name"]] = {**body, "aliases": [], "versions": []}

    def post_registered_models_alias(self, body: dict[str, Any]) -> None:
        self.version(body)
        if not re.fullmatch(r"(?!latest$|v\d+$)[\w-]+", body["alias"], re.I):
            raise Refused(400, f"Invalid alias name: '{body['alias']}'.")
        aliases = self.models[body["name"]]["aliases"]
        aliases[:] = [one for one in aliases if one["alias"] != body["alias"]]
        aliases.append({"alias": body["alias"], "version": body["version"]})

    def delete_registered_models_alias(self, body: dict[str, Any]) -> None:
        aliases = self.model(body["name"])["aliases"]
        aliases[:] = [one for one in aliases if one["alias"] != body["alias"]]

    def get_model_versions_search(self, body: dict[str, Any]) -> dict[str, Any]:
        (name,) = re.fullmatch(r"name='(.*)'", body["filter"]).groups()  # type: ignore[union-attr]
        versions = self.models.get(name, {"versions": []})["versions"]
        first, count = int(body.get("page_token", 0)), min(int(body["max_results"]), 2)  # so that pages are turned
        more = {"next_page_token": str(first + count)} if first + count < len(versions) else {}
        return {"model_versions": versions[first : first + count], **more}

    def post_model_versions_create(self, body: dict[str, Any]) -> dict[str, Any]:
        versions = self.model(body["name"])["versions"]
        self.run(body["run_id"])
        versions.append({**body, "version": str(len(versions) + 1)})
        return {"model_version": versions[-1]}

    def post_model_versions_set_tag(self, body: dict[str, Any]) -> None:
        tags = self.version(body)["tags"]
        tags[:] = [one for one in tags if one["key"] != body["key"]]
        tags.append({"key": body["key"], "value": body["value"]})

    def get_experiments_get_by_name(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["experiment_name"] not in self.experiments:
            raise Refused(404, f"Could not find experiment with name '{body['experiment_name']}'")
        return {"experiment": {"experiment_id": str(self.experiments.index(body["experiment_name"]))}}

    def post_experiments_create(self, body: dict[str, Any]) -> dict[str, Any]:
        self.experiments.append(body["name"])
        return {"experiment_id": str(len(self.experiments) - 1)}

    def post_runs_create(self, body: dict[str, Any]) -> dict[str, Any]:
        run_id = f"{len(self.runs):032x}"
        place = f"mlflow-artifacts:/{body['experiment_id']}/{run_id}/artifacts"
        data: dict[str, Any] = {"tags": body["tags"], "params": {}, "metrics": []}
        self.runs.append({"info": {"run_id": run_id, "artifact_uri": place, "status": "RUNNING"}, "data": data})
        return {"run": self.runs[-1]}

    def post_runs_search(self, body: dict[str, Any]) -> dict[str, Any]:
        key, value = re.fullmatch(r"tags\.`(.*)` = '(.*)'", body["filter"]).groups()  # type: ignore[union-attr]
        wanted = {"key": key, "value": value}
        return {"runs": [run for run in self.runs if wanted in run["data"]["tags"]][: body["max_results"]]}

    def post_runs_update(self, body: dict[str, Any]) -> None:
        self.run(body["run_id"])["info"]["status"] = body["status"]

    def post_runs_log_batch(self, body: dict[str, Any]) -> None:
        data = self.run(body["run_id"])["data"]
        for one in body["params"]:
            if data["params"].setdefault(one["key"], one["value"]) != one["value"]:
                raise Refused(400, f"Changing param values is not allowed. Param with key='{one['key']}'")
        data["metrics"] += [one for one in body["metrics"] if one not in data["metrics"]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: the second would wait for the client's word on the first
    mlflow: SmallMlflow

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        self.do_PUT()

    def do_POST(self) -> None:
        self.do_PUT()

    def do_DELETE(self) -> None:
        self.do_PUT()

    def do_PUT(self) -> None:
        url = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.command == "PUT" and url.path.startswith(FILES):
                status, answer = 200, self.mlflow.upload(unquote(url.path.removeprefix(FILES)), raw)
            else:
                body = json.loads(raw) if raw else {key: value[0] for key, value in parse_qs(url.query).items()}
                status, answer = 200, self.mlflow.answer(self.command, url.path, body)
        except Refused as error:
            status, answer = error.status, {"error_code": "REFUSED", "message": str(error)}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


@contextmanager
def small_mlflow() -> Iterator[tuple[str, SmallMlflow]]:
    """Its address, and what it holds."""
    mlflow = SmallMlflow()
    handler = type("Handler", (_Handler,), {"mlflow": mlflow})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", mlflow
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def real_mlflow(environment: Path, folder: Path, port: int) -> Iterator[str]:
    """The address of a server of that environment, its database and files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        str(environment / "bin" / "python"), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "files"),
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                break
            try:
                httpx2.get(f"{address}/health", timeout=1.0, trust_env=False).raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(0.5)
        assert server.poll() is None, (folder / "log").read_text()[-2000:]
        yield address
    finally:
        end_group(server)
