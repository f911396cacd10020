"""Renderings for other machines: what they say, and that the published schemas take them."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lora2serve.cli import run
from lora2serve.errors import UsageError
from lora2serve.serving import deploy
from lora2serve.serving.deploy import ServerSpec, server_spec
from tests.support.tiny import make_adapter, make_model

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "tests" / "schemas"
# Two fine-tunes of the demo in a bundle beside the file: what recipes/serve shows.
DEMO = ServerSpec(
    name="mayors-crafts",
    served="base",
    model="/models/base",
    local="./base",
    adapters={"mayors": "./bundle/adapters/mayors", "crafts": "./bundle/adapters/crafts"},
    rank=16,
)
CLOUD = {"store": "s3://bucket/models"}
VARIANTS = {
    "demo": DEMO,
    "hub": ServerSpec(name="a", served="base", model="org/model", revision="abc", adapters={"a": "/x/a"}, rank=8),
    "merged": ServerSpec(
        name="m", served="M_1", model="/models/m", local="/x/m", settings={"dtype": "bfloat16", "max_model_len": 512}
    ),
    "large": ServerSpec(
        name="l", served="base", model="org/model", adapters={"A.b_c": "/x/a"}, rank=64, tensor=4, pipeline=2,
        engine_arguments=("--max-model-len", "4096", "--enforce-eager", "--no-enable-prefix-caching"), size=140 << 30,
    ),
}  # fmt: skip


def rendered(kind: str, spec: ServerSpec) -> list[dict[str, Any]]:
    chosen = replace(spec, **CLOUD) if kind == "ray" else spec
    return list(yaml.load_all(deploy.render(kind, chosen), yaml.CSafeLoader))


@cache
def definitions() -> dict[str, Any]:
    files = (json.loads((SCHEMAS / name).read_text()) for name in ("kubernetes.json", "custom.json"))
    return {name: schema for file in files for name, schema in file["definitions"].items()}


def validate(kind: str, documents: list[dict[str, Any]]) -> None:
    """Raise ValidationError for the first document that its schema does not take."""
    for document in documents:
        judge("compose" if kind == "compose" else "", document.get("kind", "")).validate(document)


@cache
def judge(file: str, kind: str) -> jsonschema.Draft202012Validator:
    """Of that file, or of that kind of object in a cluster."""
    if file:
        return jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{file}.json").read_text()))
    return jsonschema.Draft202012Validator({"$ref": f"#/definitions/{kind}", "definitions": definitions()})


SERVERS = tuple(kind for kind in deploy.KINDS if kind not in deploy.ROUTES)
SCHEMED = ("compose", "k8s", "production-stack", "kserve")


@pytest.mark.parametrize("kind", SCHEMED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_schema(kind: str, variant: str) -> None:
    validate(kind, rendered(kind, VARIANTS[variant]))


def put(*path: Any) -> Callable[[list[dict[str, Any]]], None]:
    """A fault: ``put(0, "spec", "x", value)`` sets it, whatever was there."""

    def change(documents: Any) -> None:
        *before, last, value = path
        for step in before:
            documents = documents[step]
        documents[last] = value

    return change


FAULTS: list[tuple[str, Callable[[list[dict[str, Any]]], None]]] = [
    ("compose", put(0, "services", "vllm", "healtcheck", {})),
    ("compose", put(0, "services", "vllm", "healthcheck", "retries", [])),
    ("compose", put(0, "services", "vllm", "deploy", "resources", "reservations", "devices", 0, {"driver": "nvidia"})),
    ("k8s", put(1, "spec", "template", "spec", "containers", 0, "readinessProbe", "httpGet", "pth", "/")),
    ("k8s", put(1, "spec", "selector", "vllm")),
    ("k8s", put(1, "spec", "template", "spec", "containers", 0, "env", 0, {"value": "x"})),
    ("k8s", put(0, "spec", "accessModes", "ReadWriteOnce")),
    ("k8s", put(2, "spec", "ports", 0, "port", "8000")),
    ("production-stack", put(0, "spec", "vllmConfig", "maxLoras", "2")),
    ("production-stack", put(0, "spec", "deploymentConfig", "image", {"name": "x"})),
    ("production-stack", put(1, "spec", "adapterSource", "type", "disk")),
    ("production-stack", put(1, "spec", "deploymentConfig", {})),  # as an older version of the CRD had it
    ("kserve", put(0, "spec", "model", "uri", None)),
    ("kserve", put(0, "spec", "model", "lora", "maxRank", 0)),
    ("kserve", put(0, "spec", "model", "lora", "adapters", 0, {"uri": "pvc://a/b"})),
    ("kserve", put(0, "spec", "template", "containers", 0, "resource", {})),
]


@cache
def demo(kind: str) -> list[dict[str, Any]]:
    return rendered(kind, DEMO)


@pytest.mark.parametrize(("kind", "fault"), FAULTS)
def test_the_schemas_see_a_fault(kind: str, fault: Callable[[list[dict[str, Any]]], None]) -> None:
    documents = copy.deepcopy(demo(kind))
    validate(kind, documents)
    fault(documents)
    with pytest.raises(jsonschema.ValidationError):
        validate(kind, documents)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve], which is no part of the extras")
@pytest.mark.parametrize("variant", VARIANTS)
def test_ray_takes_it(variant: str) -> None:
    """Ray's own classes, and behind them vLLM's engine arguments; the control is an argument that neither knows."""
    from ray.serve.llm import LLMConfig, LLMServingArgs
    from ray.serve.schema import ServeDeploySchema

    (document,) = rendered("ray", VARIANTS[variant])
    ServeDeploySchema.model_validate(document)
    arguments = document["applications"][0]["args"]
    LLMServingArgs.model_validate(arguments)
    config = LLMConfig(**arguments["llm_configs"][0])
    assert config.get_engine_config().engine_kwargs["tensor_parallel_size"] == VARIANTS[variant].tensor
    for fault in ({"lora_config": {"dynamic_lora_loading_path": "/models"}}, {"engine_kwarg": {}}):
        with pytest.raises(ValueError):
            LLMConfig(**{**arguments["llm_configs"][0], **fault})


def test_ray_arguments() -> None:
    (document,) = rendered("ray", VARIANTS["large"])
    config = document["applications"][0]["args"]["llm_configs"][0]
    assert config["engine_kwargs"] == {
        "tensor_parallel_size": 4, "pipeline_parallel_size": 2, "enable_lora": True, "max_lora_rank": 64,
        "max_loras": 1, "max_model_len": 4096, "enforce_eager": True, "enable_prefix_caching": False,
    }  # fmt: skip
    (merged,) = rendered("ray", VARIANTS["merged"])
    config = merged["applications"][0]["args"]["llm_configs"][0]
    assert config["model_loading_config"] == {"model_id": "M_1", "model_source": "s3://bucket/models/m"}
    assert config["engine_kwargs"]["dtype"] == "bfloat16" and "lora_config" not in config
    with pytest.raises(UsageError, match="-tp: Ray Serve takes"):
        deploy.render("ray", ServerSpec(name="a", served="a", model="org/a", engine_arguments=("-tp", "2")))
    with pytest.raises(UsageError, match="Ray Serve loads from s3"):
        deploy.render("ray", DEMO)
    with pytest.raises(UsageError, match="expected pvc://CLAIM"):
        deploy.render("k8s", ServerSpec(name="a", served="a", model="org/a", store="s3://b"))


@pytest.mark.engine
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ("compose", "k8s", "production-stack"))
def test_vllm_takes_the_arguments(kind: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own parser on what the container is told; the control is a flag that it does not know."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    spec = VARIANTS[variant]
    documents = rendered(kind, spec)
    if kind == "compose":
        model, *words = documents[0]["services"]["vllm"]["command"]
    elif kind == "k8s":
        model, *words = documents[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    else:
        runtime = documents[0]["spec"]
        model, words = runtime["model"]["modelURL"], runtime["vllmConfig"]["extraArgs"]
    if "--config" in words:
        (tmp_path / "serve.yaml").write_text("dtype: bfloat16\n")
        words[words.index("--config") + 1] = str(tmp_path / "serve.yaml")
    parser = make_arg_parser(FlexibleArgumentParser())
    seen = parser.parse_args(["--model", model, *words])
    assert seen.model == spec.model and seen.served_model_name == [spec.served]
    assert seen.pipeline_parallel_size == spec.pipeline
    if spec.adapters:
        assert seen.max_lora_rank == spec.rank
    if kind != "production-stack":
        assert {one.name: one.path for one in seen.lora_modules or []} == {
            name: f"/models/adapters/{name}" for name in spec.adapters
        }
        assert seen.tensor_parallel_size == spec.tensor
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", model, *words, "--no-such-flag"])


def test_what_is_asked_of_the_machine() -> None:
    (compose,) = rendered("compose", VARIANTS["large"])
    devices = compose["services"]["vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["count"] == 8
    claim, deployment, _ = rendered("k8s", VARIANTS["large"])
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert claim["spec"]["resources"]["requests"]["storage"] == "210Gi"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert [one["valueFrom"]["secretKeyRef"]["key"] for one in container["env"] if "valueFrom" in one] == [
        "VLLM_API_KEY", "HF_TOKEN",
    ]  # fmt: skip
    (kserve,) = rendered("kserve", VARIANTS["large"])
    assert kserve["spec"]["parallelism"] == {"tensor": 4, "pipeline": 2} and "worker" in kserve["spec"]
    arguments = kserve["spec"]["template"]["containers"][0]["env"][0]
    assert arguments["value"] == "--max-model-len 4096 --enforce-eager --no-enable-prefix-caching"
    assert rendered("kserve", VARIANTS["hub"])[0]["spec"]["model"]["uri"] == "hf://org/model:abc"
    names = [one["metadata"]["name"] for one in rendered("production-stack", VARIANTS["large"])]
    assert names == ["l", "l-a-b-c"], "names that Kubernetes takes"


@pytest.mark.parametrize("kind", SERVERS)
def test_what_no_cluster_has_run_says_so(kind: deploy.DeployKind) -> None:
    first = deploy.render(kind, replace(DEMO, **CLOUD) if kind == "ray" else DEMO).splitlines()[0]
    assert first.startswith("# experimental: ") == (kind in ("production-stack", "kserve", "ray"))


@pytest.mark.parametrize("kind", SERVERS)
def test_recipes_are_what_is_rendered(kind: deploy.DeployKind) -> None:
    spec = replace(DEMO, **CLOUD) if kind == "ray" else DEMO
    stored = (ROOT / "recipes" / "serve" / f"{kind}.yaml").read_text(encoding="utf-8")
    assert stored == deploy.render(kind, spec), (
        f"run: python -m tests.serving.test_deploy, and look at recipes/serve/{kind}.yaml"
    )


def test_from_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The command line, from real exports: paths below here are relative, others absolute."""
    monkeypatch.chdir(tmp_path)
    base = make_model(tmp_path / "base-model")
    for name in ("red", "Blue_2"):
        make_adapter(tmp_path / name, base, r=12)
    assert run(["export", "red", "Blue_2", "-t", "adapter", "-o", "b"]) == 0
    assert run(["export", "red", "-t", "vllm", "-o", "merged"]) == 0

    def printed(*words: str, code: int = 0) -> list[dict[str, Any]]:
        capfd.readouterr()
        assert run(["deploy", *words]) == code
        return list(yaml.safe_load_all(capfd.readouterr().out)) if not code else []

    (compose,) = printed("compose", "b", "--port", "9000", "--host", "0.0.0.0", "--", "--dtype", "float32")
    validate("compose", [compose])
    service = compose["services"]["vllm"]
    mounts = {one["target"]: one["source"] for one in service["volumes"]}
    assert mounts == {
        "/models/base": "./base-model",
        "/models/adapters/red": "./b/adapters/red",
        "/models/adapters/Blue_2": "./b/adapters/Blue_2",
    }
    assert service["ports"] == ["0.0.0.0:9000:8000"] and "float32" in service["command"]
    assert compose["name"] == "red-blue-2"
    apart = printed("k8s", "b/adapters/red", "b/adapters/Blue_2", "--tensor-parallel-size", "2")
    validate("k8s", apart)
    container = apart[1]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][container["args"].index("--max-lora-rank") + 1] == "16"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    (merged,) = printed("compose", "merged/vllm")
    (alone,) = printed("compose", "b/adapters/red")
    assert (merged["name"], alone["name"]) == ("red", "red-adapter"), "one does not take the other's place"
    assert server_spec._object_name(["x" * 50], "") == f"{'x' * 42}-adapter" != server_spec._object_name([], "x" * 50)
    assert merged["services"]["vllm"]["volumes"][0] == {
        "type": "bind", "source": "./merged/vllm", "target": "/models/red", "read_only": True,
    }  # fmt: skip
    assert merged["services"]["vllm"]["command"][:3] == ["/models/red", "--config", "/models/red/serve.yaml"]
    assert run(["serve", "b", "--dry-run"]) == 0
    command = capfd.readouterr().out
    assert "--config" in command
    assert run(["serve", "--print", "b"]) == 0
    assert capfd.readouterr().out == command, "its former name, for one release"
    (former,) = printed("compose", "b")
    assert run(["serve", "b", "--print", "compose"]) == 0
    assert yaml.safe_load(capfd.readouterr().out) == former
    printed("nomad", "b", code=2)


def main() -> None:
    """Render recipes/serve again."""
    folder = ROOT / "recipes" / "serve"
    folder.mkdir(exist_ok=True)
    for kind in SERVERS:
        spec = replace(DEMO, **CLOUD) if kind == "ray" else DEMO
        (folder / f"{kind}.yaml").write_text(deploy.render(kind, spec), encoding="utf-8")


if __name__ == "__main__":
    main()
