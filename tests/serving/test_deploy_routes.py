"""Routes to versions of a registry: what they say, that published schemas and the libraries that read them take them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lora2serve import Registry
from lora2serve.cli import run
from lora2serve.errors import UsageError
from lora2serve.gateway.monitoring.metric_samples import parse_scrape
from lora2serve.serving import deploy
from lora2serve.serving.deploy import RouteSpec
from lora2serve.serving.deploy.argo import AGAINST, VERDICT
from lora2serve.serving.deploy.route_spec import RoutedVersion, check_weights
from tests.serving.test_deploy import put, validate
from tests.support.environments import make_environment
from tests.support.registries import add_export, make_run

ROUTE = RouteSpec(
    "Towns.1",
    (RoutedVersion("Towns.1@1", "Towns.1-1", "0" * 64, 90), RoutedVersion("Towns.1@2", "Towns.1-2", "1" * 64, 10)),
    pool="vllm",
    upstream="http://vllm:8000/v1/",
)
# LiteLLM's own router on the file that was rendered; prints how often each version was chosen, and what it refuses.
LITELLM = """
import asyncio, collections, json, os, sys, yaml
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
from litellm import Router
config = yaml.safe_load(open(sys.argv[1]))
router = Router(model_list=config["model_list"], **config["router_settings"])
async def picks():
    count = collections.Counter()
    for _ in range(2000):
        chosen = await router.async_get_available_deployment("Towns.1", request_kwargs={})
        count[chosen["litellm_params"]["model"] + " " + chosen["litellm_params"]["api_base"]] += 1
    return count
print(json.dumps(asyncio.run(picks())))
"""


CHALLENGER = replace(ROUTE, versions=ROUTE.versions[1:])


def rendered(kind: deploy.DeployKind) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(deploy.render(kind, CHALLENGER if kind == "argo" else ROUTE)))


FAULTS: list[tuple[deploy.DeployKind, Callable[[list[dict[str, Any]]], None]]] = [
    ("llm-d", put(0, "spec", "rules", 0, "targets", 0, "weight", 0)),
    ("llm-d", put(0, "spec", "rules", 0, "targets", [])),
    ("llm-d", put(0, "spec", "rules", 0, "matches", 0, "model", "type", "Prefix")),
    ("llm-d", put(0, "spec", "poolRef", {"group": "inference.networking.k8s.io"})),
    ("llm-d", put(0, "apiVersion", "inference.networking.k8s.io/v1")),
    ("argo", put(0, "spec", "metrics", 0, "succesCondition", "true")),
    ("argo", put(0, "spec", "metrics", 0, "provider", "prometheus", "query", ["up"])),
    ("argo", put(0, "spec", "args", 0, {"value": "x"})),
]


@pytest.mark.parametrize(("kind", "fault"), FAULTS)
def test_schema(kind: deploy.DeployKind, fault: Callable[[list[dict[str, Any]]], None]) -> None:
    documents = rendered(kind)
    validate(kind, documents)
    fault(documents)
    with pytest.raises(jsonschema.ValidationError):
        validate(kind, documents)


def test_what_routes_say() -> None:
    (rewrite,) = rendered("llm-d")
    assert rewrite["metadata"]["name"] == "towns-1", "a name that Kubernetes takes; clients ask for the one they know"
    assert rewrite["spec"]["rules"] == [{
        "matches": [{"model": {"type": "Exact", "value": "Towns.1"}}],
        "targets": [{"modelRewrite": "Towns.1-1", "weight": 90}, {"modelRewrite": "Towns.1-2", "weight": 10}],
    }]  # fmt: skip
    (config,) = rendered("litellm")
    assert [(one["model_name"], one["litellm_params"]["model"]) for one in config["model_list"]] == [
        ("Towns.1", "hosted_vllm/Towns.1-1"), ("Towns.1", "hosted_vllm/Towns.1-2"),
    ]  # fmt: skip
    assert {one["litellm_params"]["api_base"] for one in config["model_list"]} == {"http://vllm:8000/v1"}
    keys = {one["litellm_params"]["api_key"] for one in config["model_list"]} | {
        config["general_settings"]["master_key"]
    }
    assert all(key.startswith("os.environ/") for key in keys), "no key stands in the file"
    assert deploy.render("llm-d", ROUTE).splitlines()[1].startswith("# Towns.1@1 90, Towns.1@2 10; ")


def test_argo_waits_until_the_trial_is_decided() -> None:
    """Its conditions on what Prometheus gives: a vector, empty while nothing is decided, or where no gateway runs."""
    metric = rendered("argo")[0]["spec"]["metrics"][0]
    trial = 'adapter="Towns.1", challenger="2"'
    query = metric["provider"]["prometheus"]["query"]
    assert query == (
        f'-max({VERDICT}{{{trial}, outcome=~"{AGAINST}"}} == 1) or max({VERDICT}{{{trial}, outcome="promote"}} == 1)'
    )
    gauge = f'{VERDICT}{{adapter="Towns.1",mode="split",champion="1",challenger="2",outcome="rollback"}} 1\n'
    (seen,) = parse_scrape(gauge).trials
    assert (seen.name, seen.challenger, seen.outcome) == ("Towns.1", "2", "rollback"), "the gauge that a gateway has"

    def phase(result: list[float]) -> str:
        for key, word in (("failureCondition", "failed"), ("successCondition", "successful")):
            if eval(metric[key].replace("&&", "and"), {"len": len}, {"result": result}):
                return word
        return "inconclusive"

    assert [phase(result) for result in ([], [1.0], [-1.0])] == ["inconclusive", "successful", "failed"]
    assert metric["inconclusiveLimit"] > 1000, "Argo's own limit of 0 ends the analysis at the first look"
    assert "count" not in metric and metric["consecutiveSuccessLimit"] == 1 and metric["failureLimit"] == 0
    with pytest.raises(UsageError, match="argo: 2 versions"):
        deploy.render("argo", ROUTE)


def test_weights() -> None:
    assert check_weights((), 1) == (1,) and check_weights((90, 10), 2) == (90, 10)
    for weights, count in (((), 2), ((1, 2), 1), ((0, 1), 2), ((1_000_001,), 1)):
        with pytest.raises(UsageError, match="--weights"):
            check_weights(weights, count)


def test_from_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The command line: aliases as they point now, each version under its own name, in routes as where it is served."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA2SERVE_REGISTRY", raising=False)
    with Registry(tmp_path / "registry") as registry:
        for seed in range(2):
            made = make_run(tmp_path / f"run-{seed}" / "same-name", seed)
            add_export(made, "adapter", rank=12, served_base="org/base", name="same-name")
            registry.add(made.path, name="Towns")
        for number, alias in ((1, "champion"), (2, "staging")):
            registry.promote(f"Towns@{number}", alias)
    both = ("Towns@champion", "Towns@staging")

    def printed(*words: str) -> list[dict[str, Any]]:
        capfd.readouterr()
        assert run(["deploy", *words]) == 0
        return list(yaml.safe_load_all(capfd.readouterr().out))

    (rewrite,) = printed("llm-d", *both, "--weights", "90,10", "--pool", "vllm")
    validate("llm-d", [rewrite])
    targets = rewrite["spec"]["rules"][0]["targets"]
    (compose,) = printed("compose", *both)
    command = compose["services"]["vllm"]["command"]
    served = [json.loads(word)["name"] for word in command if word.startswith("{")]
    assert [target["modelRewrite"] for target in targets] == served == ["Towns-1", "Towns-2"]
    capfd.readouterr()
    assert run(["serve", *both, "--dry-run"]) == 0
    command = shlex.split(capfd.readouterr().out)
    assert [json.loads(word)["name"] for word in command if word.startswith("{")] == served
    services = printed("kserve", *both, "--weights", "90,10")
    validate("kserve", services)
    assert [one["spec"]["router"]["route"] for one in services] == [
        {"group": "towns", "weight": 90}, {"group": "towns", "weight": 10},
    ]  # fmt: skip
    adapters = [one["spec"]["model"]["lora"]["adapters"] for one in services]
    assert adapters == [[{"name": "Towns", "uri": f"pvc://models/adapters/Towns-{number}"}] for number in (1, 2)]
    assert len({one["metadata"]["name"] for one in services}) == 2
    (ray,) = printed("ray", *both, "--store", "s3://bucket/models")
    assert ray["applications"][0]["args"]["llm_configs"][0]["lora_config"]["max_num_adapters_per_replica"] == 2
    (template,) = printed("argo", "Towns@staging")
    validate("argo", [template])
    assert 'challenger="2"' in template["spec"]["metrics"][0]["provider"]["prometheus"]["query"]

    with Registry(tmp_path / "registry") as registry:
        registry.promote("Towns@2")
    (moved,) = printed("llm-d", "Towns@champion", "--pool", "vllm")
    assert moved["spec"]["rules"][0]["targets"] == [{"modelRewrite": "Towns-2", "weight": 1}]
    for words, message in {
        ("llm-d", "Towns@1", "Towns@2", "--pool", "p"): "--weights: 0 for 2 versions",
        ("llm-d", "Towns@1"): "--pool is missing",
        ("llm-d", *both, "--weights", "1,1", "--pool", "p"): "one version twice",
        ("llm-d", "run-0/same-name/exports/adapter", "--pool", "p"): "expected versions of a registry",
        ("llm-d", "--pool", "p"): "no version: expected versions",
        ("llm-d", "Towns@1", "--pool", "p", "--port", "9000"): "--port: deploy llm-d starts no server",
        ("llm-d", "Towns@1", "--pool", "p", "--", "--dtype", "float32"): "--: deploy llm-d starts no server",
        ("litellm", "Towns@1"): "--upstream is missing",
        ("litellm", "Towns@1", "--upstream", "http://a:b@c"): "with a password",
        ("litellm", "Towns@1", "--upstream", "vllm:8000"): "expected http://host:port",
        ("argo", "Towns@1", "Towns@2", "--weights", "1,1"): "--weights: deploy argo has no use for it",
        ("k8s", *both, "--weights", "1,1"): "--weights: deploy k8s has no use for it",
        ("kserve", "Towns@1", "--pool", "p"): "--pool: deploy kserve has no use for it",
        ("llm-d", "Towns@1", "--weights", "1,x"): "--weights x: expected whole numbers",
        ("llmd", "Towns@1"): "did you mean 'llm-d'",
    }.items():  # fmt: skip
        assert run(["deploy", *words]) == 2
        assert message in capfd.readouterr().err, words


@pytest.mark.slow
def test_litellm_goes_by_the_weights(tmp_path: Path) -> None:
    """LiteLLM's router, in an environment of its own. The control: without weights it chooses evenly."""
    make_environment(tmp_path / "environment", "litellm==1.110.2")
    shares = []
    for weight in (True, False):
        (config,) = rendered("litellm")
        for model in [] if weight else config["model_list"]:
            del model["litellm_params"]["weight"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        command = [str(tmp_path / "environment" / "bin" / "python"), "-c", LITELLM, str(tmp_path / "config.yaml")]
        environment = {**os.environ, "VLLM_API_KEY": "sk-x", "LITELLM_MASTER_KEY": "sk-y"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        picks = json.loads(done.stdout.splitlines()[-1])
        assert set(picks) <= {f"hosted_vllm/Towns.1-{number} http://vllm:8000/v1" for number in (1, 2)}
        shares.append(picks["hosted_vllm/Towns.1-1 http://vllm:8000/v1"] / 2000)
    assert 0.86 < shares[0] < 0.94 and 0.42 < shares[1] < 0.58, shares
