"""docs/cli.md, out of the commands themselves: ``python -m lora2serve.cli.reference > docs/cli.md``."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import click

from lora2serve.cli import cli

WIDTH = 100
PAGE_HEAD = """# The command line

What `lora2serve COMMAND --help` shows, made by `python -m lora2serve.cli.reference`; a test keeps it equal.

stdout carries results only: paths, or JSON with `--json`, whose keys are identifiers. Messages, bars and tables go to
stderr. Exit codes: 0 done, 1 failed, 2 usage, 3 parity or a gate not met, 130 interrupted.

Completion of commands, options, targets, types, engines, runs and exports, for bash (zsh and fish likewise):

```
eval "$(_LORA2SERVE_COMPLETE=bash_source lora2serve)"    # in ~/.bashrc
```
"""


def commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command that is shown, by its full name, in the order of ``--help``."""
    yield name, group
    for word in group.list_commands(click.Context(group)):
        command = group.commands[word]
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {word}")
        elif not command.hidden:
            yield f"{name} {word}", command


def page() -> str:
    """The whole page."""
    sections = [PAGE_HEAD]
    for name, command in commands(cli, "lora2serve"):
        settings = {**command.context_settings, "terminal_width": WIDTH, "help_option_names": ["-h", "--help"]}
        fresh = copy(command)
        fresh._help_option = None  # click keeps the names of whichever context asked first
        with click.Context(fresh, info_name=name, **settings) as context:
            sections.append(f"## {name}\n\n```\n{fresh.get_help(context).rstrip()}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    print(page(), end="")
