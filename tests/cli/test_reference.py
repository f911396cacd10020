"""docs/cli.md is what the commands say; every option and command has words; every example parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from lora2serve.cli import cli
from lora2serve.cli.options import Command
from lora2serve.cli.reference import commands, page

ROOT = Path(__file__).parents[2]
ALL = dict(commands(cli, "lora2serve"))


def test_the_page_is_what_the_commands_say() -> None:
    expected = page()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == expected, "python -m lora2serve.cli.reference"
    assert "--split-size" in expected and "Examples:" in expected and "pull-check" not in expected


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_examples_that_parse(name: str) -> None:
    command = ALL[name]
    if isinstance(command, click.Group):
        return
    assert isinstance(command, Command) and command.examples
    for example, _ in command.examples:
        words = shlex.split(re.sub(r" > \S+| -- .*", "", example))
        assert words[: len(name.split())] == name.split()
        context = command.make_context(name, words[len(name.split()) :], resilient_parsing=True)
        assert not context.args


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_words(name: str) -> None:
    options = [option for option in ALL[name].params if isinstance(option, click.Option) and not option.hidden]
    assert [option.name for option in options if not option.help] == []
