"""What the README, the docs and the CI recipes say is true: commands exist, links lead somewhere, tables match the code."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
import yaml

from lora2serve.artifacts.parity_overview import MEANINGS
from lora2serve.cli import cli
from lora2serve.exporting.sinks import find, target_names
from lora2serve.parity_check.thresholds import TABLE, Thresholds
from scripts import model_table
from tests.test_imports import LEVELS

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "recipes" / "serve" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes" / "ci").glob("*.yml")),
    *sorted((ROOT / ".github").rglob("*.yml")),
]


def commands() -> Iterator[tuple[str, str]]:
    """Every ``lora2serve ...`` in code: fenced blocks, inline code, and the lines of CI files."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".md":
            found = [line for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.S) for line in block.splitlines()]
        else:
            found = [line.strip().removeprefix("- ").removeprefix("run: ") for line in text.splitlines()]
        found += re.findall(r"`(lora2serve [a-z][^`]*)`", text.replace("\n", " "))
        for line in found:
            words = re.split("#|&&|[|]", line)[0].strip()
            if re.match("lora2serve [a-z]", words) and "${" not in words and "..." not in words:
                yield page.name, words


def test_commands_exist() -> None:
    """Each parses: the command is there and so are its options."""
    found = {(page, words): unknown_options(words) for page, words in set(commands())}
    assert len(found) > 300
    assert {where: unknown for where, unknown in found.items() if unknown} == {}


def test_an_unknown_command_and_an_unknown_option_are_seen() -> None:
    assert unknown_options("lora2serve export --target vllm --quant fp8") == []
    assert unknown_options("lora2serve export --target vllm --quants fp8") == ["--quants"]
    assert unknown_options("lora2serve exprot --target vllm") == ["exprot: no command"]


def unknown_options(words: str) -> list[str]:
    """Of a command that is there. Capital words stand for values."""
    args = [
        re.sub(r"^([A-Z_]+)$", r"1", word) if word.isupper() and not word.startswith("-") else word
        for word in shlex.split(words)[1:]
    ]
    args = [arg for arg in args if arg not in ("-v", "--quiet")]
    args = args[: args.index("--")] if "--" in args else args  # the rest is the engine's
    two = " ".join(args[:2])
    args = [two, *args[2:]] if two in cli.commands else args  # `deploy train`
    if args[0] not in cli.commands:
        return [f"{args[0]}: no command"]
    command = cli.commands[args[0]]
    while isinstance(command, click.Group) and len(args) > 1 and args[1] in command.commands:
        args = args[1:]
        command = command.commands[args[0]]
    command.make_context(args[0], [arg.strip("[]") for arg in args[1:]], resilient_parsing=True).close()
    known = {
        option
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    return [
        arg for arg in args[1:] if arg.startswith("-") and arg.split("=")[0].strip("[]") not in {*known, "--help", "-h"}
    ]


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(
            r"^(?:[A-Z_]+=\S* )?make ([a-z-]+)|`make ([a-z-]+)`", page.read_text(encoding="utf-8"), re.M
        ):
            assert re.search(rf"^{''.join(target)}:", makefile, re.M), (page.name, target)


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for name in re.findall(
        r"`((?:tests|benchmarks|recipes|lora2serve|converters)/[\w./]+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    return page.split(f"## {heading}\n", maxsplit=1)[1].split("\n## ", maxsplit=1)[0]


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section(page, heading).splitlines()
        if line[:1] == "|"
    ]
    return rows[2:]


def definitions(path: Path) -> set[str]:
    """Functions, classes and constants of a module, and what its classes define as ``Class.name``."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        own = [name for name in map(defined, [node]) if name]
        names |= {*own, *(f"{own[0]}.{name}" for name in map(defined, inner) if name)}
    return names


def defined(node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    target = (
        node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
    )
    return target.id if isinstance(target, ast.Name) else ""


@pytest.mark.parametrize("row", table(ARCHITECTURE, "Where to change what"), ids=lambda row: row[0])
def test_where_to_change_is_there(row: list[str]) -> None:
    paths = [ROOT / name for name in re.findall("`(.+?)`", row[1])]
    assert paths
    assert all(path.is_file() for path in paths), row[1]
    for name in re.findall("`(.+?)`", row[2]):
        assert name in definitions(paths[0]), name


@pytest.mark.parametrize("row", table(ARCHITECTURE, "Private parts of other libraries"), ids=lambda row: row[1][:40])
def test_private_parts_are_used_there(row: list[str]) -> None:
    text = (ROOT / row[2].strip("`")).read_text(encoding="utf-8")
    assert [name for name in re.findall("`(.+?)`", row[1]) if name not in text] == []


def test_numbers_are_those_of_the_imports() -> None:
    rows = table(ARCHITECTURE, "Who may import whom")
    assert [(int(number), tuple(re.findall("`(.+?)`", folders))) for number, folders in rows] == list(enumerate(LEVELS))
    for folder, there in re.findall(r"(\(?)`(.+?)`", " ".join(folders for _, folders in rows)):
        path = ROOT / "lora2serve" / there
        assert (path.is_dir() or path.with_suffix(".py").is_file()) == (not folder), there


@pytest.mark.engine  # reads the tests of engines
def test_models_are_those_of_the_tests() -> None:
    assert model_table.PAGE.read_text(encoding="utf-8") == model_table.written(), "make docs writes it"


def test_targets_and_types_are_those_of_the_code() -> None:
    readme, gguf, vllm = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/gguf.md", "docs/vllm.md")
    )
    assert {row[0].strip("`") for row in table(readme, "Targets")} == set(target_names())
    types = section(gguf, "Types").strip().split("\n\n")[0]
    assert set(re.findall(r"\b(?:[BI]?[FQ]|MXFP)\d[A-Z0-9_]*\b", types)) == set(find("gguf").quants)
    schemes = [name for row in table(vllm, "Schemes") for name in re.findall("`(.+?)`", row[0])]
    assert schemes == list(find("vllm").quants)


def test_thresholds_are_those_of_the_code() -> None:
    columns = ("mean_kl", "p999_kl", "top1", "ln_ppl_ratio", "nmse", "retention", "first_difference", "tensor_nmse")
    rows = re.findall(r"^\| ([^|]+?) \|(.*)\|$", (ROOT / "docs" / "parity.md").read_text(encoding="utf-8"), re.M)
    told: dict[str, tuple[str, ...]] = {}
    for names, rest in rows:
        cells = tuple(cell.strip() for cell in rest.split("|"))
        if len(cells) == len(columns) and cells[0][:1].isdigit():
            told |= dict.fromkeys(names.split(", "), cells)
    assert told.keys() == TABLE.keys()
    for name, cells in told.items():
        bounds = TABLE[name]
        for column, cell in zip(columns, cells, strict=True):
            assert getattr(bounds, column) == (float(cell) if cell else None), (name, column)
    assert set(columns) <= {field.name for field in fields(Thresholds)}


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "recipes" / "ci").glob("*.yml")), *sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"],
    ids=lambda path: path.name,
)  # fmt: skip
def test_ci_files_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def steps(workflow: Path) -> Iterator[dict[str, str]]:
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_steps_of_workflows(path: Path) -> None:
    """Targets of make exist, actions have a version, and no expression goes into a shell's text."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for step in steps(path):
        assert ("run" in step) != ("uses" in step), step
        assert "${{" not in step.get("run", ""), "what comes from outside goes through the environment"
        for target in re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target
        action = step.get("uses", "./")
        assert action.startswith("./") or re.search(r"@(v\d+|release/v\d+)$", action), action


def test_the_matrix_has_every_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    pythons = [line.rpartition(" ")[2] for line in classifiers if re.search(r"Python :: 3\.\d+$", line)]
    assert jobs["check"]["strategy"]["matrix"]["python"] == pythons


def test_what_the_figures_of_parity_mean() -> None:
    """The docs say it in the page's own sentences."""
    text = " ".join((ROOT / "docs" / "parity.md").read_text(encoding="utf-8").split())
    assert [name for name, meaning in MEANINGS.items() if meaning.removesuffix(".") not in text] == []
