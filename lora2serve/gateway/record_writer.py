"""Writes records in the background: no request waits for a disk, and what cannot be written is counted."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from lora2serve.errors import Lora2ServeError, first_line
from lora2serve.gateway.request_record import Feedback, RequestRecord, TrafficObserver
from lora2serve.gateway.traffic_store import Entry, TrafficStore
from lora2serve.progress import Progress

WAITING = 20_000  # entries that wait for the disk; more are dropped, and counted
BATCH = 500  # entries of one transaction
PAUSE = 0.1  # seconds between two of them


@dataclass
class _Truth:
    """Feedback on its way, and who waits for the records that it is on."""

    feedback: Feedback
    records: asyncio.Future[tuple[RequestRecord, ...]]
    loop: asyncio.AbstractEventLoop


_Item: TypeAlias = RequestRecord | _Truth


class RecordWriter:
    """A thread that stores entries in order, and lets observers know. ``dropped`` hears how many were lost, and why."""

    def __init__(
        self, store: TrafficStore, observers: Sequence[TrafficObserver], dropped: Callable[[int, str], object],
        progress: Progress,
    ) -> None:  # fmt: skip
        self._store, self._observers, self._dropped, self._progress = store, observers, dropped, progress
        self._queue: queue.Queue[_Item] = queue.Queue(WAITING)
        self._over = threading.Event()
        self._failed = ""
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, record: RequestRecord) -> None:
        """Store a record soon; at once for the caller."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped(1, "queue")

    async def feedback(self, feedback: Feedback) -> tuple[RequestRecord, ...]:
        """Store feedback; the records that it is on, none where the request is unknown.

        Raises Lora2ServeError where it cannot be stored.
        """
        truth = _Truth(feedback, asyncio.get_running_loop().create_future(), asyncio.get_running_loop())
        try:
            self._queue.put_nowait(truth)
        except queue.Full:
            raise Lora2ServeError("too much waits to be stored", "send it again later") from None
        return await truth.records

    def close(self) -> None:
        """Store what waits, and end."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            over = self._over.is_set()  # before the queue is looked at: what came until then is stored
            batch = self._batch()
            if batch:
                self._write(batch)
            elif over:
                self._store.close()
                return
            else:
                self._over.wait(PAUSE)

    def _batch(self) -> list[_Item]:
        batch: list[_Item] = []
        while len(batch) < BATCH:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _write(self, batch: Sequence[_Item]) -> None:
        records = [item for item in batch if isinstance(item, RequestRecord)]
        for entry in self._stored(records):
            if isinstance(entry, RequestRecord):
                self._tell([partial(observer.on_request, entry) for observer in self._observers])
        for item in batch:
            if isinstance(item, _Truth):
                self._join(item)

    def _stored(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The entries with their sequence; as they are where the disk refuses."""
        try:
            entries = self._store.append(entries)
            self._failed = ""
        except (sqlite3.Error, OSError) as error:
            self._dropped(len(entries), "disk")
            if self._failed != first_line(error):
                self._failed = first_line(error)
                self._progress.warn(f"{self._store.path}: {self._failed}: requests go on, and are not recorded")
        return entries

    def _join(self, truth: _Truth) -> None:
        """Store feedback on a request that is known."""
        records: tuple[RequestRecord, ...] = ()
        problem: Lora2ServeError | None = None
        try:
            records = self._store.of_request(truth.feedback.request_id)
            if records and not self._store.repeats(truth.feedback, records):
                (feedback,) = self._stored([truth.feedback])
                if not feedback.sequence:
                    raise Lora2ServeError(f"feedback was not stored: {self._failed}", "send it again later")
                stored = replace(truth.feedback, sequence=feedback.sequence)
                self._tell([partial(observer.on_feedback, stored, records) for observer in self._observers])
        except (Lora2ServeError, sqlite3.Error, OSError) as error:
            problem = error if isinstance(error, Lora2ServeError) else Lora2ServeError(first_line(error))
        truth.loop.call_soon_threadsafe(_settle, truth.records, problem or records)

    def _tell(self, calls: Sequence[Callable[[], None]]) -> None:
        for call in calls:
            try:
                call()
            except Exception as error:  # of an observer: records go on
                self._progress.warn(f"a record could not be judged: {type(error).__name__}: {first_line(error)}")


def _settle(future: asyncio.Future[tuple[RequestRecord, ...]], result: tuple[RequestRecord, ...] | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
