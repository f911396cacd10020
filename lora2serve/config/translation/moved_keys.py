"""The keys of one config on their way into a recipe: each is moved, or left out with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora2serve.config.schema import show

NAMES = "names, in a list or with commas between"
UNKNOWN_KEY = "unknown here: no key of a recipe does the same"


@dataclass(frozen=True)
class LeftOut:
    """A key that no recipe has a place for."""

    key: str
    value: object
    why: str

    def line(self) -> str:
        """In one line."""
        return f"{self.key}: {show(self.value)}: {self.why}"


class MovedKeys:
    """``recipe`` grows as keys are moved; what is not taken in the end is left out by name.

    Keys without a value (null, or an empty text, list or mapping) count as not there.
    """

    def __init__(self, config: Mapping[str, object]) -> None:
        self.recipe: dict[str, object] = {}
        self.left_out: list[LeftOut] = []
        self._rest = {str(key): value for key, value in config.items() if value not in (None, "", [], {})}
        self._origins: dict[str, str] = {}  # path in the recipe -> key that it came from

    def take(self, key: str) -> object:
        """The value of a key, which then is dealt with; None where it is not there."""
        return self._rest.pop(key, None)

    def take_if(self, key: str, values: tuple[object, ...]) -> object:
        """The value of a key if it is one of these; else it stays, and None."""
        return self.take(key) if self._rest.get(key) in values else None

    def take_of(self, key: str, kinds: type | tuple[type, ...], expected: str) -> object:
        """The value of a key, if it is of these types; another is left out, and None."""
        value = self.take(key)
        if value is None or isinstance(value, kinds):
            return value
        self.leave(key, value, f"expected {expected}")
        return None

    def put(self, path: str, value: object, key: str = "") -> None:
        """A value of the recipe, which came from ``key``; another key that gave it another value is left out."""
        *parents, last = path.split(".")
        section = self.recipe
        for parent in parents:
            inner = section.setdefault(parent, {})
            assert isinstance(inner, dict)
            section = inner
        origin = self._origins.get(path)
        if origin and origin != key and section[last] != value:
            self.leave(origin, section[last], f"{key} says it, too, and is taken")
        section[last] = value
        if key:
            self._origins[path] = key

    def put_default(self, path: str, value: object) -> None:
        """What the other trainer does where the config does not say it, and a recipe would do otherwise."""
        if self.get(path) is None:
            self.put(path, value)

    def get(self, path: str) -> object:
        """A value of the recipe so far."""
        found: object = self.recipe
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def move(self, keys: Mapping[str, str]) -> None:
        """Each key to its path, as it is."""
        for key, path in keys.items():
            value = self.take(key)
            if value is not None:
                self.put(path, value, key)

    def leave(self, key: str, value: object, why: str) -> None:
        """A key that was taken and has no place."""
        self.left_out.append(LeftOut(key, value, why))

    def leave_known(self, reasons: Mapping[str, str]) -> None:
        """Keys without a place whose reason is known."""
        for key in [key for key in self._rest if key in reasons]:
            self.leave(key, self.take(key), reasons[key])

    def drop_off(self, switches: tuple[str, ...]) -> None:
        """Switches that are off: so they are here."""
        for key in switches:
            if self._rest.get(key) in (False, "no", "none", 0):
                del self._rest[key]

    def leave_rest(self, prefixes: Mapping[str, str]) -> None:
        """Everything that is still there, by the reason of its prefix if there is one."""
        for key, value in list(self._rest.items()):
            why = next((why for prefix, why in prefixes.items() if key.startswith(prefix)), UNKNOWN_KEY)
            self.leave(key, value, why)
        self._rest.clear()

    def withdraw(self, path: str, why: str) -> None:
        """A value of the recipe that turned out to be none."""
        key = next((key for at, key in self._origins.items() if at == path or path.startswith(f"{at}.")), path)
        value = self.get(path)
        *parents, last = path.split(".")
        section = self.get(".".join(parents)) if parents else self.recipe
        if isinstance(section, dict):
            section.pop(last, None)
        self.leave(key, value, why)


def by_name(reasons: Mapping[str, str]) -> dict[str, str]:
    """Reasons, each with its keys in one text, by key."""
    return {key: why for why, keys in reasons.items() for key in keys.split()}
