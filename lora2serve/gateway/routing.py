"""Which version answers a request: aliases of the registry, the share of the challenger, the copy for the shadow."""

from __future__ import annotations

import asyncio
import hmac
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from lora2serve.errors import Lora2ServeError, first_line
from lora2serve.gateway.adapter_cache import AdapterCache, Key
from lora2serve.gateway.gateway_config import GatewayConfig
from lora2serve.gateway.request_record import Arm
from lora2serve.progress import Progress
from lora2serve.registry.live_aliases import LiveAliases

CHAMPION = "champion"
POLL = 0.4  # seconds between two looks at the registry: a move is seen within one
RETRY = 5.0  # seconds before a version that could not be loaded is tried again
BUCKETS = 10_000
Follow: TypeAlias = Callable[[int], LiveAliases | None]


class RouteObserver(Protocol):
    """Hears what becomes of routes."""

    def registry_seen(self, ok: bool) -> None:
        """Whether the registry could be read."""
        ...

    def moved(self, name: str, numbers: Mapping[str, int]) -> None:
        """The versions of a name's arms, from now on."""
        ...


@dataclass(frozen=True)
class RouteChoice:
    """What answers: ``version`` in that arm, and a copy for ``shadow`` once it has."""

    name: str
    version: int
    arm: Arm
    champion: int  # answers where the challenger's server is gone
    shadow: int | None = None


@dataclass
class _Route:
    """The versions that answer now; ``wanted`` are those of the registry, which may still be loading."""

    numbers: dict[str, int] = field(default_factory=dict)  # alias -> version
    wanted: dict[str, int] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class Routes:
    """The routes of all names that have a champion, kept as the registry has them."""

    def __init__(
        self, config: GatewayConfig, cache: AdapterCache, follow: Follow, secret: bytes, observer: RouteObserver,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._config, self._cache, self._follow, self._secret = config, cache, follow, secret
        self._observer, self._progress = observer, progress
        self._routes: dict[str, _Route] = {}
        self._event = -1
        self._failed = ""
        self._random = random.Random()

    def __contains__(self, model: str) -> bool:
        name, _, alias = model.partition("@")
        return name in self._routes and (alias or CHAMPION) in self._routes[name].numbers

    def models(self) -> Iterator[str]:
        """What clients may name: each name, and each of its aliases."""
        for name, route in sorted(self._routes.items()):
            if CHAMPION in route.numbers:
                yield name
            yield from (f"{name}@{alias}" for alias in sorted(route.numbers))

    def table(self) -> dict[str, dict[str, int]]:
        """Name -> alias -> the version that answers."""
        return {name: dict(route.numbers) for name, route in sorted(self._routes.items())}

    def choose(self, model: str, unit: str) -> RouteChoice:
        """The version for a request that names this model, by whom it is from."""
        name, _, alias = model.partition("@")
        numbers = self._routes[name].numbers
        if alias:
            return RouteChoice(name, numbers[alias], "named", numbers[alias])
        split, champion = self._config.route(name), numbers[CHAMPION]
        shadow = numbers.get(split.shadow.alias)
        copied = shadow is not None and shadow != champion and self._random.random() < split.shadow.share
        challenger = numbers.get(split.challenger.alias)
        if (
            challenger not in (None, champion)
            and self._bucket(name, challenger, unit) < split.challenger.share * BUCKETS
        ):
            return RouteChoice(name, challenger, "challenger", champion)
        return RouteChoice(name, champion, "champion", champion, shadow if copied else None)

    def _bucket(self, name: str, challenger: int, unit: str) -> int:
        """0 to 9,999, the same for a unit as long as the trial lasts; another trial draws anew."""
        digest = hmac.digest(self._secret, f"{name}\0{challenger}\0{unit}".encode("utf-8", "surrogatepass"), "sha256")
        return int.from_bytes(digest[:8], "big") % BUCKETS

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(POLL)

    async def look(self) -> None:
        """See what was moved. A registry that cannot be read leaves everything as it is."""
        try:
            live = await asyncio.to_thread(self._follow, self._event)
        except Exception as error:  # whatever it is, the next look may see it again
            self._observer.registry_seen(False)
            if self._failed != first_line(error):
                self._failed = first_line(error)
                self._progress.warn(f"{self._failed}: versions stay as they are until the registry can be read")
            return
        self._failed = ""
        self._observer.registry_seen(True)
        if live is not None:
            self._event = live.event
            self._take(live)

    async def close(self) -> None:
        """End what is being loaded."""
        tasks = [route.task for route in self._routes.values() if route.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, live: LiveAliases) -> None:
        """Let each name go to the versions that the registry has; those of the first look at once."""
        pinned: set[Key] = set()
        for name, wanted in live.numbers.items():
            split = self._config.route(name)
            roles = (CHAMPION, split.challenger.alias, split.shadow.alias)
            pinned |= {(name, wanted[role]) for role in roles if role in wanted}
            pinned |= {(name, number) for alias, number in live.before.get(name, {}).items() if alias == CHAMPION}
        self._cache.pin(pinned)
        for name, wanted in live.numbers.items():
            route = self._routes.setdefault(name, _Route())
            if wanted != route.wanted:
                first = not route.wanted
                route.wanted = dict(wanted)
                if first and wanted:
                    route.numbers = dict(wanted)
                    self._observer.moved(name, route.numbers)
                before = live.before.get(name, {}).get(CHAMPION)
                if route.task:
                    route.task.cancel()
                route.task = asyncio.ensure_future(self._go(name, route, before))

    async def _go(self, name: str, route: _Route, before: int | None) -> None:
        """Load what answers from now on, then let it answer; the old one does until then."""
        for alias in [alias for alias in route.numbers if alias not in route.wanted]:
            del route.numbers[alias]
        self._observer.moved(name, route.numbers)
        await asyncio.gather(*(self._go_alias(name, route, alias) for alias in route.wanted))
        if before is not None:
            with suppress(Lora2ServeError):  # it is loaded so that a rollback is at once, and no request waits for it
                await self._cache.ensure((name, before))

    async def _go_alias(self, name: str, route: _Route, alias: str) -> None:
        split, number = self._config.route(name), route.wanted[alias]
        if alias in (CHAMPION, split.challenger.alias, split.shadow.alias):
            await self._load(name, number)
        if route.numbers.get(alias) != number:
            route.numbers[alias] = number
            self._progress.note(f"{name}@{alias} is {name}@{number}")
        self._observer.moved(name, route.numbers)

    async def _load(self, name: str, number: int) -> None:
        """Until it is there: a server may be away for a while."""
        failed = ""
        while True:
            try:
                await self._cache.ensure((name, number))
                return
            except Lora2ServeError as error:
                if first_line(error) != failed:
                    failed = first_line(error)
                    self._progress.warn(f"{error.message}; the version before answers until it can")
            await asyncio.sleep(RETRY)
