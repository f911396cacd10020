"""From a QLoRA fine-tune to a served model, with proof that what is served is what was trained.

The functions below do what the commands of the same names do. Each is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # not from typing: `python -m lora2serve` would take one in the current folder (see __main__.py)
if TYPE_CHECKING:
    from lora2serve.api.chat_with_model import chat
    from lora2serve.api.check_parity import ParityResult, parity, plan_parity
    from lora2serve.api.compare_models import compare, plan_comparison
    from lora2serve.api.data_preview import preview_data
    from lora2serve.api.deploy_server import deploy
    from lora2serve.api.deploy_training import deploy_training
    from lora2serve.api.evaluate_model import EvaluationResult, evaluate, plan_evaluation
    from lora2serve.api.evaluation_request import CompareRequest, EvaluationRequest
    from lora2serve.api.export_model import export, plan_export
    from lora2serve.api.export_request import ExportRequest
    from lora2serve.api.inspect_path import inspect
    from lora2serve.api.parity_request import ParityRequest
    from lora2serve.api.plan_training import TrainingPlan, plan
    from lora2serve.api.push_to_hub import push
    from lora2serve.api.serve_model import RunningServer, serve
    from lora2serve.api.train_run import init, train
    from lora2serve.api.verify_copy import Verified, verify
    from lora2serve.api.version_registry import Registry
    from lora2serve.artifacts.run import Run
    from lora2serve.errors import Lora2ServeError
    from lora2serve.evaluation.evaluation_plan import EvaluationPlan
    from lora2serve.exporting.stream import ExportPlan
    from lora2serve.gateway.drift.check_drift import drift
    from lora2serve.gateway.drift.drift_report import DriftReport
    from lora2serve.gateway.run_gateway import RunningGateway, start_gateway
    from lora2serve.parity_check.chat_session import Answer, ChatSession
    from lora2serve.parity_check.parity_plan import ParityPlan
    from lora2serve.progress import Progress
    from lora2serve.sweeping.many_runs import train_many
    from lora2serve.sweeping.run_outcome import RunOutcome
    from lora2serve.sweeping.sweep_plan import SweepPlan, plan_sweep
    from lora2serve.sweeping.sweep_recipe import SweepResult, sweep
    from lora2serve.sweeping.sweep_request import SweepRequest

__version__ = "0.1.0"
__all__ = [
    "Answer", "ChatSession", "CompareRequest", "DriftReport", "EvaluationPlan", "EvaluationRequest",
    "EvaluationResult", "ExportPlan", "ExportRequest", "Lora2ServeError", "ParityPlan", "ParityRequest",
    "ParityResult", "Progress", "Registry", "Run", "RunOutcome", "RunningGateway", "RunningServer", "SweepPlan",
    "SweepRequest", "SweepResult", "TrainingPlan", "Verified", "chat", "compare", "deploy", "deploy_training",
    "drift", "evaluate", "export", "init", "inspect", "parity", "plan", "plan_comparison", "plan_evaluation",
    "plan_export", "plan_parity", "plan_sweep", "preview_data", "push", "serve", "start_gateway", "sweep", "train",
    "train_many", "verify",
]  # fmt: skip
_MODULES = {
    "api.chat_with_model": ("chat",),
    "api.check_parity": ("ParityResult", "parity", "plan_parity"),
    "api.compare_models": ("compare", "plan_comparison"),
    "api.data_preview": ("preview_data",),
    "api.deploy_server": ("deploy",),
    "api.deploy_training": ("deploy_training",),
    "api.evaluate_model": ("EvaluationResult", "evaluate", "plan_evaluation"),
    "api.evaluation_request": ("CompareRequest", "EvaluationRequest"),
    "api.export_model": ("export", "plan_export"),
    "api.export_request": ("ExportRequest",),
    "api.inspect_path": ("inspect",),
    "api.parity_request": ("ParityRequest",),
    "api.plan_training": ("TrainingPlan", "plan"),
    "api.push_to_hub": ("push",),
    "api.serve_model": ("RunningServer", "serve"),
    "api.train_run": ("init", "train"),
    "api.verify_copy": ("Verified", "verify"),
    "api.version_registry": ("Registry",),
    "artifacts.run": ("Run",),
    "errors": ("Lora2ServeError",),
    "evaluation.evaluation_plan": ("EvaluationPlan",),
    "exporting.stream": ("ExportPlan",),
    "gateway.drift.check_drift": ("drift",),
    "gateway.drift.drift_report": ("DriftReport",),
    "gateway.run_gateway": ("RunningGateway", "start_gateway"),
    "parity_check.chat_session": ("Answer", "ChatSession"),
    "parity_check.parity_plan": ("ParityPlan",),
    "progress": ("Progress",),
    "sweeping.many_runs": ("train_many",),
    "sweeping.run_outcome": ("RunOutcome",),
    "sweeping.sweep_plan": ("SweepPlan", "plan_sweep"),
    "sweeping.sweep_recipe": ("SweepResult", "sweep"),
    "sweeping.sweep_request": ("SweepRequest",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
