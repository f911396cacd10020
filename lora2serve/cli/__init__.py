"""The command line: options in, one call, report out. Importing it imports nothing heavy."""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

import click

from lora2serve import __version__
from lora2serve.cli.adapters import adapters
from lora2serve.cli.chat import chat
from lora2serve.cli.compare import compare
from lora2serve.cli.data import data
from lora2serve.cli.deploy import deploy
from lora2serve.cli.deploy_train import deploy_train
from lora2serve.cli.doctor import doctor
from lora2serve.cli.drift import drift
from lora2serve.cli.evaluate import evaluate
from lora2serve.cli.export import export
from lora2serve.cli.gateway import gateway
from lora2serve.cli.inspect import inspect
from lora2serve.cli.leave import leave
from lora2serve.cli.options import CommandGroup
from lora2serve.cli.parity import parity
from lora2serve.cli.plan import plan
from lora2serve.cli.push import pull_check, push, verify
from lora2serve.cli.registry import registry
from lora2serve.cli.serve import serve
from lora2serve.cli.sweep import sweep
from lora2serve.cli.top import top
from lora2serve.cli.train import init, train
from lora2serve.errors import EndedTogether, Lora2ServeError, of_system
from lora2serve.system import interruption, own_process, scratch
from lora2serve.system.extras import EXTRA_OF, install_hint

VERBOSE = {"-v", "--verbose"}
EVERYWHERE = VERBOSE | {"--quiet"}  # options that may stand before the command or behind it


@click.group(
    cls=CommandGroup,
    epilog="Start with `lora2serve train demo`, or with `lora2serve init` in an empty folder.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="lora2serve")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks and the libraries' own logs.")
@click.option("--quiet", is_flag=True, help="No progress, only results, warnings and errors.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool, quiet: bool) -> None:
    """From a QLoRA fine-tune to a served model, with proof that what is served is what was trained."""
    ctx.obj = {"verbose": verbose, "quiet": quiet}
    _sweep(quiet)


def _sweep(quiet: bool) -> None:
    """Remove what a killed command left; a word of the processes that ran on, a server, say."""
    from lora2serve import console

    processes, _ = scratch.sweep()
    if processes:
        what = "1 process" if processes == 1 else f"{processes} processes"
        console.Terminal(quiet).note(f"ended {what} that a killed lora2serve had left")


for command in (
    init, data, plan, train, sweep, chat, evaluate, compare, export, parity, push, verify, pull_check, serve, deploy,
    deploy_train, adapters, registry, gateway, drift, top, inspect, doctor,
):  # fmt: skip
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The one funnel to an exit code: 0 done, 1 failed, 2 usage, 3 parity or a gate not met, 130 interrupted."""
    words = list(sys.argv[1:] if args is None else args)
    if sys.stderr is None:  # closed by whoever started this, and libraries take it for a file
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    own_process.claim()
    gc.set_threshold(100_000, 20)  # importing torch makes a million objects that stay: not looked through every 700
    if not VERBOSE & set(words):
        # What the libraries log is not about the user's input; our messages go through Progress.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    from lora2serve import console  # while it loads, a signal ends the process as it ends any other

    try:
        interruption.end_like_ctrl_c()
        code = run(words)
    except KeyboardInterrupt:  # as that begins or ends
        console.Terminal().note("interrupted")
        code = 130
    leave(code)


def run(args: list[str]) -> int:
    """Run one command line; the exit code."""
    from lora2serve import console

    try:
        code = cli.main(_options_first(args), prog_name="lora2serve", standalone_mode=False)
        return code if isinstance(code, int) else 0  # of ``ctx.exit``
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except (KeyboardInterrupt, click.Abort):
        scratch.forget_kept()
        console.Terminal().note("interrupted")
        return 130
    except EndedTogether as end:
        return end.exit_code
    except BrokenPipeError:
        sys.stdout = None  # the reader is gone: nothing more to flush
        return 1
    except Exception as problem:
        if VERBOSE & set(args):
            traceback.print_exc()
        error = _as_ours(problem)
        console.error(error)
        return error.exit_code


def _options_first(args: list[str]) -> list[str]:
    """``lora2serve train -v`` is ``lora2serve -v train``; what stands behind ``--`` is an engine's."""
    own = args[: args.index("--")] if "--" in args else args
    first = [word for word in own if word in EVERYWHERE]
    return [*first, *(word for word in own if word not in EVERYWHERE), *args[len(own) :]]


def _as_ours(problem: Exception) -> Lora2ServeError:
    """Any exception as an error of one line and a way out."""
    first = (str(problem).strip().splitlines() or ["no message"])[0]
    if isinstance(problem, Lora2ServeError):
        return problem
    if isinstance(problem, ModuleNotFoundError) and not problem.name and isinstance(problem.__cause__, Exception):
        return _as_ours(problem.__cause__)  # transformers' word for any error while it imports a part of itself
    if isinstance(problem, ModuleNotFoundError):
        package = (problem.name or "").split(".")[0]
        return Lora2ServeError(f"{package} is not installed", install_hint(EXTRA_OF.get(package, "train")))
    if isinstance(problem, ImportError):
        return Lora2ServeError(f"a library cannot be loaded: {first}", install_hint("train"))
    if isinstance(problem, OSError) and problem.strerror:
        return of_system(problem)
    return Lora2ServeError(f"{type(problem).__name__}: {first}", "unexpected: `lora2serve -v ...` shows the traceback")
