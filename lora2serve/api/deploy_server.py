"""``lora2serve.deploy``: files for other machines, of servers and of routes to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora2serve.api.export_request import Named, several
from lora2serve.api.registered import registered_version
from lora2serve.api.serve_model import chosen_exports
from lora2serve.config.arguments import checked
from lora2serve.errors import UsageError
from lora2serve.registry.version_record import Version
from lora2serve.serving.deploy import ROUTES, DeployKind, RouteSpec, ServerSpec, gather, render
from lora2serve.serving.deploy.route_spec import RoutedVersion, check_weights
from lora2serve.serving.deploy.server_spec import STORE
from lora2serve.serving.server import HOST, PORT, ServeOptions

# Which kinds read what, of that which not all read.
READERS: Mapping[str, tuple[DeployKind, ...]] = {
    "--weights": ("kserve", "llm-d", "litellm"), "--pool": ("llm-d",), "--upstream": ("litellm",),
}  # fmt: skip


@checked
def deploy(
    kind: DeployKind, exports: Named | Sequence[Named] = (), *,
    base: Named | None = None, host: str = HOST, port: int = PORT, tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1, store: str = STORE, engine_arguments: str | Sequence[str] = (),
    weights: Sequence[int] = (), pool: str = "", upstream: str = "",
) -> str:  # fmt: skip
    """The YAML of a vLLM server for other machines, or of a route to versions that are served there.

    kind: "compose", "k8s", "production-stack", "kserve" or "ray" is a server of ``exports``. "llm-d", "litellm" and
        "argo" are for versions of one name in the registry, such as ``medical-qa@champion``, each of which is served as
        ``medical-qa-7``: the first two split what asks for ``medical-qa``, the third waits for the gateway's verdict.
    store: where a cluster finds ``base/`` and ``adapters/``: ``pvc://CLAIM``; for kserve and ray also ``s3://...``.
    weights: how often each version answers, such as 90 and 10; kserve then starts a server for each.
    pool: for llm-d, the InferencePool that serves the versions.
    upstream: for litellm, the address of the vLLM that serves them.

    The other arguments are those of ``serve``. Raises UsageError for exports that vLLM does not serve, for what is no
    version, and for arguments that a kind has no use for.
    """
    options = ServeOptions(
        None, str(base) if base else None, host, port, False, tensor_parallel_size, pipeline_parallel_size,
        several(engine_arguments),
    )  # fmt: skip
    _check_kind(kind, {"--weights": weights, "--pool": pool, "--upstream": upstream})
    named = several(exports)
    if kind in ROUTES:
        _refuse_server_options(kind, options, store)
        return render(kind, _route(kind, named, weights, pool, upstream)).rstrip("\n")
    if weights:
        return render(kind, *_shared_name(named, weights, options, store)).rstrip("\n")
    return render(kind, gather(chosen_exports([Path(name) for name in named]), options, store)).rstrip("\n")


def _check_kind(kind: str, arguments: Mapping[str, object]) -> None:
    """UsageError for what a kind would not read."""
    for option, value in arguments.items():
        if value and kind not in READERS[option]:
            raise UsageError(f"{option}: deploy {kind} has no use for it", f"it is for {', '.join(READERS[option])}")


def _route(kind: str, names: Sequence[Named], weights: Sequence[int], pool: str, upstream: str) -> RouteSpec:
    versions = _versions(names)
    split = kind in READERS["--weights"]
    shares = check_weights(weights, len(versions)) if split else [1] * len(versions)
    routed = [
        RoutedVersion(version.reference, version.folder, version.sha256, weight)
        for version, weight in zip(versions, shares, strict=True)
    ]
    return RouteSpec(versions[0].name, tuple(routed), pool, upstream)


def _shared_name(names: Sequence[Named], weights: Sequence[int], options: ServeOptions, store: str) -> list[ServerSpec]:
    """A server for each version, under the name that they share."""
    versions = _versions(names)
    shares = check_weights(weights, len(versions))
    paths = [chosen_exports([Path(name)]) for name in names]
    return [
        replace(gather(path, options, store), route=version.name, weight=weight)
        for path, version, weight in zip(paths, versions, shares, strict=True)
    ]


def _versions(names: Sequence[Named]) -> list[Version]:
    """The versions of one name that are meant; UsageError for what is none, and for those that must not be live."""
    from lora2serve.api.version_registry import Registry

    references = {str(name): registered_version(name) for name in names}
    unknown = [name for name, reference in references.items() if reference is None]
    if unknown or not references:
        raise UsageError(
            f"{unknown[0] if unknown else 'no version'}: expected versions of a registry",
            "such as medical-qa@champion medical-qa@challenger",
        )
    with Registry() as registry:
        versions = [registry.get(name.partition("/")[0]) for name in references]
    if len({version.name for version in versions}) > 1:
        raise UsageError(f"{', '.join(references)}: versions of several names", "one route is for one name")
    if len({version.number for version in versions}) < len(names):
        raise UsageError(f"{', '.join(map(str, names))}: one version twice", "`lora2serve registry show NAME@ALIAS`")
    if gone := next((version for version in versions if version.state != "active"), None):
        raise UsageError(f"{gone.reference}: {gone.state}", f"`lora2serve registry history {gone.name}` says why")
    return versions


def _refuse_server_options(kind: str, options: ServeOptions, store: str) -> None:
    """A route starts no server: what is said of one would be lost."""
    given = {
        "--base": options.base is not None, "--host": options.host != HOST, "--port": options.port != PORT,
        "--tensor-parallel-size": options.tensor_parallel_size != 1,
        "--pipeline-parallel-size": options.pipeline_parallel_size != 1,
        "--store": store != STORE, "--": bool(options.engine_arguments),
    }  # fmt: skip
    if lost := [option for option, is_given in given.items() if is_given]:
        raise UsageError(f"{lost[0]}: deploy {kind} starts no server", "k8s, kserve and others do")
