"""What the commands share: help with groups and examples, options that several have, completion, a progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from lora2serve.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from lora2serve.parity_check.installed_engines import EngineState
    from lora2serve.progress import Progress

F = TypeVar("F", bound=Callable[..., object])
ENGINE_ARGUMENTS = "lora2serve.engine_arguments"


class GroupedOption(click.Option):
    """An option that ``--help`` shows under a heading of its own."""

    def __init__(self, *args: Any, group: str = "", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class Command(click.Command):
    """A command whose ``--help`` has its options in groups, and examples at its end."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = examples  # (command, what it does)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of each group; those without one first."""
        groups: dict[str, list[tuple[str, str]]] = {"": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", ""), []).append(record)
        for group, records in groups.items():
            with formatter.section(f"{group} options" if group else "Options"):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, and the epilog below."""
        _write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)


class CommandGroup(click.Group):
    """Proposes the nearest command for a mistyped one; one below another shows an example of each of its commands."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = self.commands.values() if ctx.parent else ()
        _write_examples(formatter, [one for command in commands for one in getattr(command, "examples", ())[:1]])
        super().format_epilog(ctx, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if (two := " ".join(args[:2])) in self.commands:  # `deploy train`, beside `deploy KIND`
            return two, self.commands[two], args[2:]
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            visible = [name for name, command in self.commands.items() if not command.hidden]
            ctx.fail(f"no such command {args[0]!r}{did_you_mean(args[0], visible)}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the work


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """Each on a line, what it does beside it."""
    if examples:
        width = max(len(command) for command, _ in examples)
        with formatter.section("Examples"):
            for command, purpose in examples:
                line = f"{command:<{width}}  # {purpose}" if purpose else command
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class EngineCommand(Command):
    """Keeps what stands behind ``--`` for the engine."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        ctx.meta[ENGINE_ARGUMENTS] = tuple(args[len(own) + 1 :])
        return super().parse_args(ctx, list(own))

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- ENGINE ARGUMENTS]"]


def progress(ctx: click.Context) -> Progress:
    """The terminal, as loud as the options say."""
    from lora2serve.console import Terminal

    return Terminal(quiet=ctx.find_root().obj["quiet"])


def renamed(ctx: click.Context, old: str, new: str) -> None:
    """A note on stderr for a name that works for one release more."""
    progress(ctx).note(f"note: {old} is now {new}; the old name works until the next release")


def plain(value: object) -> object:
    """A result as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def names(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Words with commas between. An option without one is an empty variable of a script, and asks for something."""
    found = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if text is not None and not found:
        raise click.BadParameter("empty, expected one name at least")
    return found


def complete_targets(ctx: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """Targets that begin with ``word``."""
    from lora2serve.exporting import sinks

    return [CompletionItem(name) for name in sinks.target_names() if name.startswith(word)]


def complete_quants(ctx: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """Types of the targets on the command line, or of all targets, that begin with ``word``."""
    from lora2serve.exporting import sinks

    targets = ctx.params.get("targets") or sinks.target_names()
    types = dict.fromkeys(quant for target in targets for quant in sinks.find(target).quants)
    return [CompletionItem(quant) for quant in types if quant.lower().startswith(word.lower())]


def complete_engines(ctx: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """Engines of parity, behind those that the word has already."""
    from lora2serve.parity_check.comparisons import NAMES

    *before, last = word.split(",")
    return [CompletionItem(",".join([*before, name])) for name in NAMES if name.startswith(last)]


def complete_runs(ctx: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """Runs under ``runs/``, and any path."""
    runs = sorted(path.parent.as_posix() for path in Path("runs").glob("*/run.json"))
    return [*(CompletionItem(run) for run in runs if run.startswith(word)), CompletionItem(word, type="file")]


def complete_exports(ctx: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """Exports of runs, and any path."""
    exports = sorted(path.parent.as_posix() for path in Path("runs").glob("*/exports/*/lora2serve.json"))
    return [*(CompletionItem(path) for path in exports if path.startswith(word)), CompletionItem(word, type="file")]


class Choice(click.Choice[str]):
    """One of a few words: a mistyped one is answered with the nearest."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            option = next((name for name in (param.opts if param else []) if name.startswith("--")), "")
            near = did_you_mean(value, self.choices)
            raise UsageError(f"{option} {value}: unknown{near}".strip(), f"known: {', '.join(self.choices)}")
        return value


def json_option(command: F) -> F:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Results as JSON.")(command)


def dry_run_option(*aliases: str, help: str) -> Callable[[F], F]:
    """``--dry-run``."""
    return click.option("--dry-run", *aliases, "dry_run", is_flag=True, help=help)


def engine_cell(engine: EngineState) -> str:
    """Whether an engine can be asked here, and the way out where it cannot."""
    if engine.name == "openai":
        return "a server, not asked now"
    return f"no: {engine.missing}\n{engine.fix}".rstrip() if engine.missing else "yes"


def exports_argument(command: F) -> F:
    """``[EXPORT]...``"""
    return click.argument(
        "exports", metavar="[EXPORT]...", nargs=-1, type=click.Path(path_type=Path), shell_complete=complete_exports
    )(command)


def server_options(command: F) -> F:
    """What ``serve`` and ``deploy`` have in common."""
    for option in (
        click.option("--pipeline-parallel-size", type=click.IntRange(min=1), default=1, help="Groups of layers."),
        click.option("--tensor-parallel-size", type=click.IntRange(min=1), default=1, help="GPUs per layer."),
        click.option(
            "--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on."
        ),
        click.option(
            "--host",
            default="127.0.0.1",
            show_default=True,
            help="Address to listen on; 0.0.0.0 lets any machine connect.",
        ),
        click.option("--base", metavar="MODEL", help="Adapters: the base to load (default: the one trained on)."),
    ):
        command = option(command)
    return command
