"""Arguments against annotations: what fits arrives as annotated, what does not is named, all at once."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest

import lora2serve
from lora2serve.config.arguments import checked, checked_methods, hints_of
from lora2serve.config.schema import show
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.progress import Progress, Silent

if TYPE_CHECKING:
    from lora2serve.artifacts.run import Run

Taken = dict[str, object]


class InBytes:
    """A path that is no text."""

    def __fspath__(self) -> bytes:
        return b"a"

    def __repr__(self) -> str:
        return "InBytes()"


@checked
def work(
    model: str | Path | Sequence[str | Path] | None = None, run: Run | None = None, *, limit: int | None = None,
    chat: bool = False, folder: Path | None = None, share: float = 0.5, kind: Literal["vllm", "ollama"] = "vllm",
    bounds: Mapping[str, float] | None = None, overrides: Mapping[str, object] | Sequence[str] = (),
    ranks: Sequence[int] = (), pair: tuple[str, str] = ("a", "b"), heard: Callable[[int], object] | None = None, progress: Progress | None = None,
) -> Taken:  # fmt: skip
    """Work."""
    return dict(locals())


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [({"model": PurePosixPath("a")}, Path("a")), ({"model": ["a", Path("b")]}, ("a", Path("b"))),
     ({"limit": np.int64(3)}, 3), ({"chat": np.True_}, True), ({"pair": ["c", "d"]}, ("c", "d")), ({"share": 1}, 1), ({"share": np.float32(0.5)}, 0.5), ({"share": Fraction(1, 4)}, 0.25),
     ({"kind": "ollama"}, "ollama"), ({"bounds": {"kl": 1}}, {"kl": 1}), ({"overrides": {"a": None}}, {"a": None}),
     ({"overrides": iter("ab")}, ("a", "b")), ({"ranks": range(2)}, (0, 1)), ({"heard": print}, print), ({"run": 5}, 5),
     ({"ranks": {8: 1}.keys()}, (8,)), ({"folder": "a"}, Path("a")),
     ({"overrides": "a=b"}, ("a=b",)), ({"model": "\udcff"}, "\udcff"), ({"limit": None}, None)],
)  # fmt: skip
def test_what_fits_arrives_as_annotated(arguments: dict[str, object], taken: object) -> None:
    got = work(**arguments)[next(iter(arguments))]  # type: ignore[arg-type]
    assert got == taken and type(got) is type(taken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"model": 5}, "model: 5, expected a text or a path or a list of texts or paths"),
     ({"model": b"a"}, "model: b'a', expected a text or a path or a list of texts or paths"),
     ({"model": ["a", 5]}, "model[1]: 5, expected a text or a path"),
     ({"model": {"a": 1}}, "model: {'a': 1}, expected a text or a path or a list of texts or paths"),
     ({"limit": "x"}, "limit: 'x', expected a whole number"),
     ({"limit": True}, "limit: True, expected a whole number"),
     ({"limit": 3.0}, "limit: 3.0, expected a whole number"),
     ({"chat": "no"}, "chat: 'no', expected True or False"),
     ({"chat": None}, "chat: None, expected True or False"),
     ({"folder": b"a"}, "folder: b'a', expected a path"),
     ({"folder": InBytes()}, "folder: InBytes(), expected a path"),
     ({"share": "hot"}, "share: 'hot', expected a number"),
     ({"share": False}, "share: False, expected a number"),
     ({"share": decimal.Decimal(1)}, "share: Decimal('1'), expected a number"),
     ({"share": 10**400}, f"share: {show(10**400)}, expected a number in the range of a float"),
     ({"share": math.nan}, "share: nan, expected a number in the range of a float"),
     ({"limit": -(10**5000)}, "limit: <int>, expected a whole number in the range of a float"),
     ({"bounds": {5: 1.0}}, "bounds: 5, expected a text"),
     ({"ranks": np.array(8)}, "ranks: array(8), expected a list of whole numbers"),
     ({"pair": ["a"]}, "pair: ['a'], expected 2 values"),
     ({"share": 1j}, "share: 1j, expected a number"),
     ({"kind": "olama"}, "kind: 'olama', expected one of vllm, ollama (did you mean 'ollama'?)"),
     ({"kind": ["vllm"]}, "kind: ['vllm'], expected one of vllm, ollama"),
     ({"bounds": {"kl": "x"}}, "bounds['kl']: 'x', expected a number"),
     ({"bounds": [1]}, "bounds: [1], expected a dict"),
     ({"overrides": 5}, "overrides: 5, expected a dict or a list of texts"),
     ({"model": "a\0"}, "model: 'a\\x00', expected a text that may be a path"),
     ({"model": ["\ud800"]}, "model[0]: '\\ud800', expected a text that may be a path"),
     ({"ranks": "8"}, "ranks: '8', expected a list of whole numbers"),
     ({"ranks": [8, "x"]}, "ranks[1]: 'x', expected a whole number"),
     ({"heard": 5}, "heard: 5, expected a function"),
     ({"progress": 5}, "progress: 5, expected Progress"),
     ({"progress": Silent}, "progress: <class 'lora2serve.progress.Silent'>, expected Progress"),
     ({"kind": np.array(["vllm", "x"])}, "kind: array(['vllm', 'x'], dtype='<U4'), expected one of vllm, ollama"),
     ({"limit": "x", "chat": 1}, "limit: 'x', expected a whole number\nchat: 1, expected True or False")],
)  # fmt: skip
def test_what_does_not_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        work(**arguments)  # type: ignore[arg-type]
    assert caught.value.message == message


def test_names_and_numbers_of_arguments_are_pythons_matter() -> None:
    for call, words in (
        (lambda: work("a", None, 3), "takes from 0 to 2 positional arguments but 3 were given"),  # type: ignore[misc]
        (lambda: work("a", model="b"), "multiple values for argument 'model'"),  # type: ignore[misc]
        (lambda: work(limti=3), "unexpected keyword argument 'limti'"),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_what_the_system_refuses_is_an_error_of_ours(tmp_path: Path) -> None:
    @checked
    def write(path: Path, error: str = "") -> None:
        if error:
            raise BrokenPipeError
        path.write_text("")

    with pytest.raises(lora2serve.Lora2ServeError, match=r"nowhere/x: No such file or directory") as caught:
        write(tmp_path / "nowhere" / "x")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(lora2serve.Lora2ServeError, match="File name too long"):
        lora2serve.inspect("x" * 5000)
    with pytest.raises(BrokenPipeError):
        write(tmp_path, "pipe")


def test_methods() -> None:
    @checked_methods
    class Shelf:
        def __init__(self, place: str) -> None:
            self.place = place

        @classmethod
        def make(cls, place: str, *, size: int = 1) -> Shelf:
            return cls(place)

        def add(self, count: int) -> int:
            return self._twice(count)

        def _twice(self, count: int) -> int:
            return 2 * count

    assert Shelf.make("here").add(2) == 4 and Shelf("here")._twice("a") == "aa"  # type: ignore[arg-type, comparison-overlap]
    for call in (lambda: Shelf(5), lambda: Shelf.make("a", size="b"), lambda: Shelf("a").add("b")):  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            call()


def test_requests_are_taken_the_same_way(tmp_path: Path) -> None:
    request = lora2serve.ParityRequest("run", exports=["a", tmp_path], engines="peft", thresholds={"all.top1": 1})  # type: ignore[arg-type]
    assert (request.exports, request.engines) == (("a", tmp_path), ("peft",))
    assert lora2serve.ExportRequest(("a",), ("vllm",), out=str(tmp_path)).out == tmp_path  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"engines\[0\]: 5, expected a text"):
        lora2serve.ParityRequest("run", engines=[5])  # type: ignore[arg-type]

    class Named(lora2serve.SweepRequest):
        """One of a user's own."""

    with pytest.raises(UsageError, match="jobs: 'many', expected a whole number"):
        Named(jobs="many")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [value for name in lora2serve.__all__ if name.endswith("Request")
                                  for value in [getattr(lora2serve, name)]])  # fmt: skip
def test_the_fields_of_requests_can_be_read(kind: type) -> None:
    assert len(hints_of(kind)) > 3 and object not in hints_of(kind).values()


def public() -> list[Callable[..., object]]:
    """Every function of the Python API, and every method of its registry."""
    values = [getattr(lora2serve, name) for name in lora2serve.__all__]
    methods = [method for name, method in vars(lora2serve.Registry).items() if not name.startswith("_")]
    functions = [value for value in values if not isinstance(value, type)]
    return [*functions, *(method for method in methods if callable(method)), lora2serve.ChatSession.ask]


@pytest.mark.parametrize("function", public(), ids=lambda function: function.__name__)
def test_everything_public_is_checked(function: Callable[..., object]) -> None:
    """Also that each annotation can be read when it runs: one that cannot takes anything."""
    names = [name for name in hints_of(function) if name != "self"]
    assert hasattr(function, "__wrapped__") or not names, "not @checked"
    assert [name for name in names if hints_of(function)[name] is object] == []


def test_progress_of_ours_is_progress() -> None:
    assert work(progress=default_progress())["progress"] is not None
    assert hints_of(work)["run"] is object, "the control: Run is known to type checkers alone"
