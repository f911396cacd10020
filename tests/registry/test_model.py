"""A registry against a model of a few lines, in sequences that hypothesis draws: aliases, rollback, retirement, gc."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lora2serve import Registry
from lora2serve.errors import GateNotMet, UsageError
from tests.support.registries import add_export, make_run
from tests.support.shared import once

SEEDS = 5
ALIASES = st.sampled_from(("champion", "staging"))
SEED = st.integers(0, SEEDS - 1)
NUMBERS = st.integers(1, SEEDS)


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Made once for all sequences: nobody writes into them."""

    def make(folder: Path) -> None:
        for seed in range(SEEDS):
            add_export(make_run(folder / f"run-{seed}", seed))

    RegistryMachine.runs = once(tmp_path_factory, "model-runs", make)


class RegistryMachine(RuleBasedStateMachine):
    """``order`` are the seeds in the order of their versions, ``states`` and ``stacks`` what must be so."""

    runs: Path

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="registry-", dir=self.runs.parent))
        self.order: list[int] = []
        self.states: dict[int, str] = {}
        self.retired: set[int] = set()
        self.stacks: dict[str, list[int]] = {}
        self.removed: set[str] = set()  # aliases that are not there now
        self.pointed: dict[str, list[int]] = {}  # all that an alias ever pointed to, the last one last
        self.registry = Registry(self.folder / "registry")
        self.add(0)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.registry.close()
            shutil.rmtree(self.folder)

    @rule(seed=SEED)
    def add(self, seed: int) -> None:
        if seed not in self.order:
            self.order.append(seed)
        number = self.order.index(seed) + 1
        if self.states.get(number, "collected") == "collected":
            self.states[number] = "retired" if number in self.retired else "active"
        version = self.registry.add(self.runs / f"run-{seed}", name="m")
        assert (version.number, version.state) == (number, self.states[number])

    @rule(number=NUMBERS, alias=ALIASES, force=st.booleans())
    def promote(self, number: int, alias: str, force: bool) -> None:
        state = self.states.get(number)
        if state == "active" or (state == "retired" and force):
            self.registry.promote(f"m@{number}", alias, force=force, why="drawn")
            self.point(alias, number)
        else:
            with pytest.raises(GateNotMet if state == "retired" else UsageError):
                self.registry.promote(f"m@{number}", alias, force=force, why="drawn")

    @rule(alias=ALIASES)
    def rollback(self, alias: str) -> None:
        stack = self.stacks.get(alias, []) if alias in self.current() else []
        earlier = [number for number in reversed(stack[:-1]) if self.states[number] == "active"]
        if not earlier:
            with pytest.raises(UsageError):
                self.registry.rollback("m", alias=alias)
            return
        assert self.registry.rollback("m", alias=alias).number == earlier[0]
        self.pop_to(alias, earlier[0])

    @rule(alias=ALIASES, number=NUMBERS)
    def rollback_to(self, alias: str, number: int) -> None:
        if alias not in self.current() or self.states.get(number) != "active":
            with pytest.raises(UsageError):
                self.registry.rollback("m", alias=alias, to=number)
            return
        self.registry.rollback("m", alias=alias, to=number)
        self.pop_to(alias, number)

    @rule(alias=ALIASES)
    def unset(self, alias: str) -> None:
        if alias not in self.current():
            with pytest.raises(UsageError):
                self.registry.unset(f"m@{alias}")
            return
        assert self.registry.unset(f"m@{alias}").number == self.stacks[alias][-1]
        self.removed.add(alias)

    @rule(number=NUMBERS)
    def retire(self, number: int) -> None:
        if number not in self.states or number in self.current().values():
            with pytest.raises(UsageError):
                self.registry.retire(f"m@{number}")
            return
        self.registry.retire(f"m@{number}")
        if self.states[number] == "active":
            self.states[number] = "retired"
            self.retired.add(number)

    @rule(keep=st.integers(1, 3))
    def collect(self, keep: int) -> None:
        there = [number for number in sorted(self.states, reverse=True) if self.states[number] != "collected"]
        staying = set(there[:keep]) | set(self.current().values())
        for numbers in self.pointed.values():
            recent = list(dict.fromkeys(reversed(numbers)))
            staying |= set(recent[:keep])
        gone = sorted(set(there) - staying)
        assert self.registry.gc(keep=keep).versions == tuple(f"m@{number}" for number in gone)
        self.states |= dict.fromkeys(gone, "collected")

    @invariant()
    def all_is_as_it_must_be(self) -> None:
        if hasattr(self, "registry"):
            assert self.registry.aliases("m") == self.current()
            live = self.registry.live()
            assert live is not None and live.numbers == {"m": self.current()}
            assert live.before.get("m", {}) == {
                alias: earlier[0]
                for alias in self.current()
                if (earlier := [n for n in reversed(self.stacks[alias][:-1]) if self.states[n] == "active"])
            }
            assert self.registry.live(live.event) is None, "nothing was done since"
            assert {version.number: version.state for version in self.registry.versions("m")} == self.states
            self.registry.verify()

    def current(self) -> dict[str, int]:
        return {alias: stack[-1] for alias, stack in self.stacks.items() if alias not in self.removed}

    def point(self, alias: str, number: int) -> None:
        self.removed.discard(alias)
        stack = self.stacks.setdefault(alias, [])
        if not stack or stack[-1] != number:
            stack.append(number)
            self.pointed.setdefault(alias, []).append(number)

    def pop_to(self, alias: str, number: int) -> None:
        stack = self.stacks[alias]
        if stack[-1] == number:
            return
        self.pointed[alias].append(number)
        if number in stack:
            while stack[-1] != number:
                stack.pop()
        else:
            stack.append(number)


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=3, stateful_step_count=10, deadline=None)


@pytest.mark.slow
class TestManySequences(RegistryMachine.TestCase):  # type: ignore[valid-type, misc]
    settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_the_control() -> None:
    """A registry that forgets to pop is seen."""
    machine = RegistryMachine()
    machine.begin()
    machine.add(1)
    machine.promote(1, "champion", False)
    machine.promote(2, "champion", False)
    machine.rollback("champion")
    machine.all_is_as_it_must_be()
    machine.stacks["champion"].append(2)
    with pytest.raises(AssertionError):
        machine.all_is_as_it_must_be()
    machine.teardown()
