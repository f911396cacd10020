"""Recipes: every problem at once with its key path, and any YAML at all gives a Recipe or one kind of error."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora2serve.config.other_names import OTHER_NAMES
from lora2serve.config.recipe import (
    DataRecipe,
    LoraRecipe,
    ParityRecipe,
    Recipe,
    dump,
    find,
    load,
    load_section,
    named_keys,
    template,
)
from lora2serve.errors import RecipeError, UsageError
from lora2serve.progress import Silent
from tests.support.drawn import examples

LEAST = {"model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}}


class Notes(Silent):
    """What is noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def key_paths(kind: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every key path of a recipe, with its field."""
    hints, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        found |= key_paths(hint, f"{path}.") if dataclasses.is_dataclass(hint) else {path: field}
    return found


def put(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of ``content`` with ``value`` at a key path."""
    first, _, rest = path.partition(".")
    return {**content, first: put(content.get(first) or {}, rest, value) if rest else value}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def writer(content: Any) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return writer


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value.message.splitlines()


def test_defaults_of_the_issue(write: Any) -> None:
    recipe = load(write(LEAST))
    train, lora = recipe.train, recipe.train.lora
    assert (train.learning_rate, train.max_grad_norm, train.quantize, train.double_quant) == (2e-4, 0.3, "nf4", True)
    assert train.trackers == ()
    assert lora.targets == "all-linear"


def test_all_problems_at_once(write: Any) -> None:
    """Missing, mistyped, of a wrong type and out of bounds, in one go; none hides another."""
    content = {
        "name": "a b",
        "modle": 1,
        "data": {"train": "x", "max_length": 2, "eval": "e", "eval_split": 0.1},
        "train": {
            "quantize": "nf5",
            "epochs": 0,
            "batch_size": "eight",
            "learning_rate": "2e-4",
            "warmup": 3,
            "lora": {"rnak": 3, "rank": 0, "targets": "qkv", "init": "pisa"},
        },
        "parity": {"tokens": [1]},
    }
    assert [line.removeprefix("r.yaml: ").split(": ")[0] for line in problems(write(content))] == [
        "modle",
        "model.path",
        "data.max_length",
        "train.lora.rnak",
        "train.lora.rank",
        "train.quantize",
        "train.epochs",
        "train.batch_size",
        "train.warmup",
        "parity.tokens",
        "name",
        "train.lora.targets",
        "train.lora.init",
        "data.eval_split",
    ]


def test_a_typo_in_each_key_is_named(write: Any) -> None:
    """Each alone: two beside each other might hide one another."""
    for path in (path for path in key_paths() if path.count(".") < 3):
        parent, _, last = path.rpartition(".")
        typo = last[:-1] if len(last) > 4 else f"{last}s"
        lines = problems(write(put(LEAST, f"{parent}.{typo}" if parent else typo, 1)))
        named = f"r.yaml: {parent}{'.' if parent else ''}{typo}: unknown key (did you mean {path!r}?)"
        assert [line for line in lines if typo in line] == [named]


def test_a_wrong_type_in_each_key_is_named_beside_another_problem(write: Any) -> None:
    for path in key_paths():
        content = put(put(LEAST, "train.lora.nonsense", 1), path, {"a": object.__name__})
        lines = problems(write(content))
        assert any(line.startswith(f"r.yaml: {path}") and "expected" in line for line in lines), (path, lines)
        assert any("train.lora.nonsense: unknown key" in line for line in lines), f"beside {path} it is told, too"


BAD = [
    ("name", "../up"),
    ("name", "latest"),
    ("model.path", ""),
    ("data.train", ""),
    ("data.max_length", 7),
    ("data.eval_split", 0.95),
    ("train.epochs", 0),
    ("train.epochs", float("inf")),
    ("train.epochs", float("nan")),
    ("train.steps", 0),
    ("train.batch_size", True),
    ("train.batch_size", 2.0),
    ("train.learning_rate", 0),
    ("train.learning_rate", "fast"),
    ("train.learning_rate", 10**400),
    ("train.schedule", "cosin"),
    ("train.weight_decay", -0.1),
    ("train.seed", -1),
    ("train.seed", 1 << 32),
    ("train.early_stopping", 3),
    ("train.save_best", True),
    ("train.lora.alpha", 0),
    ("train.lora.targets", []),
    ("train.lora.targets", [1]),
    ("train.lora.init", "pissa"),  # on a quantized base
    ("train.lora.init", "eva"),
    ("parity.thresholds", {"Q4_K_M": 1}),
    ("parity.thresholds", {"Q4_K_M": {"mean_kl": "x"}}),
    ("parity.thresholds", {"Q4_K_M": {"mean_kl": float("inf")}}),
    ("parity.thresholds", {"Q4_K_M": {"mean_kl": float("nan")}}),
    ("parity.thresholds", {"Q4_K_M": {"mean_kl": ".inf"}}),
]


@pytest.mark.parametrize(("path", "value"), BAD)
def test_a_bad_value_is_one_line(write: Any, path: str, value: Any) -> None:
    (line,) = problems(write(put(LEAST, path, value)))
    assert line.startswith(f"r.yaml: {path}")
    assert "expected" in line or "need" in line


def test_an_unknown_preset_names_the_near_one(write: Any) -> None:
    assert problems(write(put(LEAST, "train.lora.targets", "qvmlp"))) == [
        "r.yaml: train.lora.targets: unknown preset 'qvmlp' (did you mean 'qv-mlp'?); "
        "presets: qv, attention, qv-mlp, all-linear, or a list of module names"
    ]


def test_what_other_libraries_call_a_key(write: Any) -> None:
    """Each is answered with the key's name, or with its path where it belongs elsewhere; every path is there."""
    sections = {path.rpartition(".")[0] for path in key_paths()}
    assert set(OTHER_NAMES.values()) <= key_paths().keys() | sections
    assert problems(write(LEAST), "lora.rank=8") == ["--set lora: unknown key (did you mean 'train.lora'?)"]
    assert not OTHER_NAMES.keys() & set(WORDS) - {path.rpartition(".")[2] for path in OTHER_NAMES.values()}
    for name in ("r", "lora_r", "lora_rank"):
        assert problems(write(put(LEAST, f"train.lora.{name}", 8))) == [
            f"r.yaml: train.lora.{name}: unknown key (did you mean 'train.lora.rank'?)"
        ]
    for section in ("", "train."):
        (line,) = problems(write(put(LEAST, f"{section}lora_alpha", 8)))
        assert line.endswith("did you mean 'train.lora.alpha'?)")
    assert problems(write(LEAST), "train.lora.target_modules=[q_proj]") == [
        "--set train.lora.target_modules: unknown key (did you mean 'train.lora.targets'?)"
    ]
    assert problems(write(put(LEAST, "data.path", "rows.jsonl"))) == [
        "r.yaml: data.path: unknown key (did you mean 'data.train'?)"
    ]
    assert problems(write(put(LEAST, "parity.path", "x"))) == ["r.yaml: parity.path: unknown key"]
    (line,) = problems(write(put(LEAST, "learning_rate", 1e-4)))
    assert line == "r.yaml: learning_rate: unknown key (did you mean 'train.learning_rate'?)"


def test_fp4_says_what_to_train_instead(write: Any) -> None:
    """Earlier releases trained it: their runs' other sections are read all the same, their recipe is refused."""
    path = write({**LEAST, "train": {"quantize": "fp4"}, "parity": {"tokens": 7}})
    (line,) = problems(path)
    assert line.startswith("r.yaml: train.quantize: 'fp4', expected nf4 or none: fp4 is no longer trained")
    assert load_section(path, ParityRecipe).tokens == 7
    assert load_section(path, DataRecipe).train == "rows.jsonl"
    with pytest.raises(RecipeError, match=r"r\.yaml: parity\.tokens: 0, expected 1 to"):
        load_section(write({**LEAST, "parity": {"tokens": 0}}), ParityRecipe)
    assert "no longer" not in problems(write(put(LEAST, "train.quantize", "fp8")))[0], "the control"


GOOD = [
    ("name", "llama-3.2_v1"),
    ("data.eval_split", 0.1),
    ("train.epochs", 3),
    ("train.steps", None),
    ("train.learning_rate", "2e-4"),
    ("train.lora.targets", ["q_proj"]),
    ("train.lora.targets", "qv-mlp"),
    ("train.lora.init", "gaussian"),
    ("train.trackers", "wandb"),
    ("parity.thresholds", {"Q4_K_M": {"mean_kl": 1}}),
    ("parity", None),  # every line of the section is a comment
]


@pytest.mark.parametrize(("path", "value"), GOOD)
def test_the_control(write: Any, path: str, value: Any) -> None:
    assert load(write(put(LEAST, path, value)))


def test_inits_that_need_the_full_base(write: Any) -> None:
    for init in ("pissa", "pissa_niter_16", "olora", "orthogonal"):
        content = put(put(LEAST, "train.lora.init", init), "train.quantize", "none")
        assert load(write(content)).train.lora.init == init
    assert "even" in problems(write(put(content, "train.lora.rank", 3)))[0]


def test_a_key_given_twice(write: Any) -> None:
    text = "model: {path: a}\ndata: {train: b}\ntrain:\n  steps: 1\n  lora: {rank: 2, rank: 4}\ntrain:\n  epochs: 2\n"
    assert problems(write(text)) == ["r.yaml: train.lora.rank: given twice", "r.yaml: train: given twice"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "expected"),
        ("- a", "expected keys and values"),
        ("just text", "expected keys and values"),
        ("d: 2024-99-99", "month"),
        ("x: !!python/object:os.system {}", "could not determine a constructor"),
        ("[" * 100, "nested more than 50 deep"),
        ("", "model.path: missing"),
        ("&a [*a]", "expected keys and values"),
        ("model: &m {path: a, deeper: *m}\ndata: {train: b}", "model.deeper: unknown key"),
    ],
)
def test_what_is_no_recipe(write: Any, text: str, said: str) -> None:
    assert said in "\n".join(problems(write(text)))


def test_a_number_too_long_to_print(write: Any) -> None:
    text = "model: {path: a}\ndata: {train: b}\ntrain: {steps: 0x" + "f" * 5000 + "}"
    assert problems(write(text)) == [f"r.yaml: train.steps: <int>, expected 1 to {1 << 40}"]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: \xff")
    for path, said in ((tmp_path / "r.yaml", "not UTF-8"), (tmp_path, "directory"), (tmp_path / "no", "No such file")):
        with pytest.raises(RecipeError, match=said):
            load(path)


def test_overrides(write: Any) -> None:
    path = write({**LEAST, "train": None})
    recipe = load(path, ["train.lora.rank=32", "train.lora.targets=[q_proj, v_proj]", "train.learning_rate=1e-3"])
    assert (recipe.train.lora.rank, recipe.train.lora.targets) == (32, ("q_proj", "v_proj"))
    assert recipe.train.learning_rate == 1e-3
    assert problems(path, "train.lora.rnak=32", "novalue", "name.x=1", "train.steps=x") == [
        "--set novalue: expected KEY=VALUE",
        "--set name: {'x': 1}, expected text",
        "--set train.lora.rnak: unknown key (did you mean 'train.lora.rank'?)",
        "--set train.steps: 'x', expected a whole number",
    ]
    both = problems(write({**LEAST, "train": {"batch_size": "x"}}), "train.steps=x")
    assert [problem.split(":")[0] for problem in both] == ["--set train.steps", "r.yaml"], "each where it comes from"
    assert "name holds no keys" in problems(write({**LEAST, "name": "x"}), "name.x=1")[0]


def test_another_kind_of_adapter_by_set(write: Any) -> None:
    """What the file says of its own kind is left out, and named; what --set itself says is not."""
    path, told = write({**LEAST, "train": {"quantize": "none", "lora": {"rank": 8, "dropout": 0.05}}}), Notes()
    train = load(path, ["train.method=loha", "train.options.r=4"], told).train
    assert (train.method, train.lora, dict(train.options)) == ("loha", LoraRecipe(), {"r": 4})
    assert told.texts == ["train.lora of r.yaml is left out: train.method is loha"]
    assert problems(path, 'train.method="loha"', "train.lora.rank=4") == [
        "--set train.lora.rank: 4, but train.method is loha, whose options are in train.options"
    ]
    assert load(path, ["train.method=lora"], told).train.lora.rank == 8, "its own kind: nothing is left out"
    path = write({**LEAST, "train": {"method": "loha", "quantize": "none", "options": {"r": 4}}})
    assert load(path, ["train.method=lora"], told).train.method == "lora"
    assert told.texts[1:] == ["train.options of r.yaml is left out: train.method is lora"]


def test_keys_that_are_named(write: Any) -> None:
    path = write({**LEAST, "train": {"lora": {"rank": 16, "alpha": None}}})
    assert named_keys(path, ["train.steps=5"]) == {"model.path", "data.train", "train.lora.rank", "train.steps"}


def test_paths_are_relative_to_the_recipe(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir("/")
    recipe = load(write(LEAST))
    assert recipe.data.train == str(tmp_path / "rows.jsonl")
    assert recipe.model.path == "some/model", "what is not there may be a Hub id"


def test_dump_is_read_back(write: Any) -> None:
    content = put(put(LEAST, "parity.thresholds", {"F16": {"mean_kl": 0.5}}), "train.lora.targets", ["q_proj"])
    recipe = load(write(content))
    assert load(write(dump(recipe))) == recipe


def _number(value: Any) -> str:
    try:
        return str(float(value))
    except (TypeError, ValueError):
        return ""


def test_template_names_every_key_and_its_default(write: Any) -> None:
    text = template()
    assert load(write(text)).train.epochs == 3
    shown = dict(re.findall(r"^\s*(?:#\s+)?(\w+): ([^#\n]+)", text, re.MULTILINE))
    known = {path.rpartition(".")[2]: field for path, field in key_paths().items()}
    assert not known.keys() - shown.keys()
    # shown in the template with an example, on purpose not with the default
    free = {"path", "name", "train", "epochs", "eval_split", "engines", "require", "allow"}
    for name in known.keys() - free:
        default = known[name].default
        if default not in (None, dataclasses.MISSING):
            value = yaml.safe_load(shown[name])
            assert (list(default) if isinstance(default, tuple) else str(default)) in (
                value,
                str(value),
                _number(value),
            ), name


def test_commented_keys_of_the_template_are_at_their_place(write: Any) -> None:
    """With every comment sign of a key taken out, what is left are the pairs that exclude each other."""
    text = re.sub(r"^(\s*)#( +)(?=\w+: )", lambda m: m[1] + (m[2] if not m[1] else ""), template(), flags=re.MULTILINE)
    lines = problems(write(text.replace("# parity:", "parity:")))
    assert lines == ["r.yaml: data.eval_split: expected either eval or eval_split, not both"]


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no lora2serve\.yaml here"):
        find(None)
    with pytest.raises(UsageError, match="did you mean 'demo'"):
        find("dmeo")
    with pytest.raises(UsageError, match=r"recipe '\.': a directory, expected a YAML file or a built-in recipe"):
        find(".")
    assert find("demo").name == "demo.yaml"
    (tmp_path / "lora2serve.yaml").touch()
    assert find(None) == Path("lora2serve.yaml")


WORDS = sorted({part for path in key_paths() for part in path.split(".")})
KEYS: Any = st.sampled_from(WORDS) | st.text(max_size=8) | st.integers() | st.booleans() | st.none()
SCALARS: Any = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates() | st.binary(max_size=5)
    | st.sampled_from(["nf4", "none", "qv", "all-linear", "2e-4", "1e999", "pissa", -(10**400)])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "name": VALUES,
        "model": VALUES | st.fixed_dictionaries({"path": VALUES}),
        "data": VALUES | st.fixed_dictionaries({"train": VALUES}, optional={"max_length": VALUES, "eval": VALUES}),
        "train": VALUES
        | st.fixed_dictionaries({}, optional={"lora": VALUES, "steps": VALUES, "quantize": VALUES, "seed": VALUES}),
        "parity": VALUES | st.fixed_dictionaries({}, optional={"thresholds": VALUES}),
    },
)


def recipe_or_problems(path: Path) -> None:
    """Either a Recipe that survives being written and read, or one-line problems in one style."""
    try:
        recipe = load(path)
    except RecipeError as error:
        assert error.hint or not error.message.startswith("r.yaml")
        for line in error.message.splitlines():
            assert line.startswith(("r.yaml: ", str(path)))
            assert len(line) < 600
    else:
        path.write_text(dump(recipe), encoding="utf-8")
        assert load(path) == recipe


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(SECTIONS, st.dictionaries(KEYS, VALUES, max_size=5)))
@example(content={"train": {"lora": {"rank_pattern": {"\x1e": "x"}}}})
def test_any_mapping(tmp_path: Path, content: dict[Any, Any]) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", errors="surrogatepass"))
    recipe_or_problems(path)


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.binary(max_size=60) | st.text("&*a[]{}:,-? \n!'\"|>#%0.1e", max_size=40))
def test_any_text(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass"))
    recipe_or_problems(path)


def test_several_data_sets(write: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    train = ["a.jsonl", {"path": "a.jsonl", "weight": 2}, {"path": "user/set", "subset": "talk", "split": "test"}]
    recipe = load(write(put(LEAST, "data", {"train": train, "eval": ["user/set"], "subset": "all"})))
    a, twice, hub = recipe.data.sources("train")
    assert (a.path, a.weight, a.split, a.subset) == (str(tmp_path / "a.jsonl"), 1.0, "train", "all")
    assert (twice.path, twice.weight) == (a.path, 2.0)
    assert (hub.path, hub.split, hub.subset) == ("user/set", "test", "talk")
    assert [source.path for source in recipe.data.sources("eval")] == ["user/set"]
    assert load(write(dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([], "data.train: empty, expected a path or a Hub id"),
        ([""], "data.train[0]: empty, expected a path or a Hub id"),
        ([3], "data.train[0]: 3, expected text or keys and values"),
        (["a\ud83d"], "data.train[0]: 'a\\ud83d', which has half of a surrogate pair: no text"),
        (3, "data.train: 3, expected text or a list"),
        ([{"weight": 1}], "data.train[0].path: missing"),
        ([{"path": "a", "wieght": 1}], "data.train[0].wieght: unknown key (did you mean 'data.train[0].weight'?)"),
        ([{"path": "a", "weight": 0}], "data.train[0].weight: 0.0, expected more than 0 and at most 1000"),
    ],
)
def test_bad_data_sets(write: Any, train: Any, said: str) -> None:
    assert problems(write(put(LEAST, "data.train", train))) == [f"r.yaml: {said}"]


def test_what_is_evaluated(write: Any) -> None:
    """Suites beside the recipe, and held-out rows only where there are some."""
    recipe = {**LEAST, "evaluate": {"suites": ["held-out", "medqa.yaml"], "limit": 5}}
    with pytest.raises(RecipeError, match=r"evaluate\.suites: held-out needs eval data"):
        load(write(recipe))
    path = write(put(recipe, "data", {"train": "train.jsonl", "eval_split": 0.1}))
    (path.parent / "medqa.yaml").write_text("")
    assert load(path).evaluate.suites == ("held-out", str(path.parent / "medqa.yaml"))
