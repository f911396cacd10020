"""Trainings on other machines, rendered from a recipe: one module per kind, each with ``render(spec)``."""

from __future__ import annotations

from importlib import import_module
from typing import Literal, get_args

from lora2serve.serving.deploy.jobs.job_spec import JobSpec

__all__ = ["JOB_KINDS", "JobKind", "JobSpec", "render_job"]

JobKind = Literal["k8s", "kubeflow", "slurm", "skypilot"]
JOB_KINDS: tuple[JobKind, ...] = get_args(JobKind)


def render_job(kind: JobKind, spec: JobSpec) -> str:
    """A file of that kind, with how it is used in its first lines."""
    module = import_module(f"lora2serve.serving.deploy.jobs.{kind}_job")
    text: str = module.render(spec)
    return text
