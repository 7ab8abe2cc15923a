"""One queue for all interfaces: what waits, what is being made, and how requests of equal shape become batches."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from latentdiff.serving.settings import Limits
from latentdiff.serving.work import Draw, Failed, Made, Piece, Preview, Step

Event = Step | Preview | Made | Failed  # of a job; pieces are numbered by their place in it from 0


class Full(Exception):
    """More images wait than are allowed to."""


class Closed(Exception):
    """The server stops and takes nothing more."""


class Job:
    """The images of one request, from the moment that it is accepted.

    Attributes:
        ends: place -> its image or its failure.
        steps, previews: place -> the last of an image in the making.
        began: when the first of its images was taken on, in seconds of `time.monotonic`.
    """

    def __init__(self, number: int, draw: Draw, seeds: Sequence[int], first_piece: int) -> None:
        self.number, self.draw = number, draw
        self.pieces = [Piece(first_piece + place, seed, draw) for place, seed in enumerate(seeds)]
        self.began = 0.0
        self.ends: dict[int, Made | Failed] = {}
        self.steps: dict[int, Step] = {}
        self.previews: dict[int, Preview] = {}
        self._told: list[Event] = []  # what a watcher that comes late has to know
        self._watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[Event]]] = []
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether every image is there or will never be."""
        return len(self.ends) == len(self.pieces)

    @property
    def made(self) -> list[Made]:
        """The images that are there, in their order."""
        return [end for _, end in sorted(self.ends.items()) if isinstance(end, Made)]

    @property
    def failure(self) -> Failed | None:
        """The first thing that went wrong."""
        return next((end for _, end in sorted(self.ends.items()) if isinstance(end, Failed)), None)

    @property
    def progress(self) -> float:
        """0 to 1, over all images."""
        shares = (step.done / max(1, step.steps) for place, step in self.steps.items() if place not in self.ends)
        return (len(self.ends) + sum(shares)) / len(self.pieces)

    def add(self, event: Event) -> None:
        """Note what has happened, and tell whoever watches; from any thread."""
        with self._lock:
            match event:
                case Made(place) | Failed(place):
                    self.ends[place] = event
                    self.previews.pop(place, None)
                    self._told = [other for other in self._told if not _is_preview_of(other, place)]
                    self._told.append(event)
                case Preview(place, index):
                    self.previews[place] = event
                    self._told += [event] * (index is not None)
                case Step(numbers):
                    self.steps.update(dict.fromkeys(numbers, event))
            for loop, events in self._watchers:
                loop.call_soon_threadsafe(events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """What has happened and happens, to the end of the job."""
        events = asyncio.Queue[Event]()
        watcher = asyncio.get_running_loop(), events
        with self._lock:
            for event in self._told:
                events.put_nowait(event)
            self._watchers.append(watcher)
        ends = 0
        try:
            while ends < len(self.pieces):
                event = await events.get()
                ends += isinstance(event, Made | Failed)
                yield event
        finally:
            with self._lock:
                self._watchers.remove(watcher)

    async def finished(self) -> None:
        """Wait until the job is over."""
        async for _ in self.events():
            pass


def _is_preview_of(event: Event, place: int) -> bool:
    return isinstance(event, Preview) and event.number == place


class Queue:
    """First come, first served; whoever has the shape of the next image goes along with it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Piece] = deque()
        self._owners: dict[int, Job] = {}  # by the number of a piece that is not over
        self._numbers, self._jobs = itertools.count(1), itertools.count(1)
        self._change = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def in_making(self) -> int:
        """Images that a worker has taken on."""
        return len(self._owners) - len(self._waiting)

    @property
    def jobs(self) -> list[Job]:
        """Those that are not over, in the order of their coming."""
        return list({job.number: job for job in list(self._owners.values())}.values())

    def submit(self, draw: Draw, seeds: Sequence[int]) -> Job:
        """Take a request on.

        Raises:
            Full, Closed: it is not taken.
        """
        with self._change:
            if self._is_closed:
                raise Closed
            if len(self._waiting) + len(seeds) > self._limits.queue:
                raise Full
            first = next(self._numbers)
            for _ in seeds[1:]:
                next(self._numbers)
            job = Job(next(self._jobs), draw, seeds, first)
            self._waiting.extend(job.pieces)
            self._owners.update((piece.number, job) for piece in job.pieces)
            self._change.notify()
        return job

    def take(self, timeout: float | None = None) -> list[Piece]:
        """The next batch; waits for one. Empty after the timeout."""
        with self._change:
            self._change.wait_for(lambda: self._waiting, timeout)
            if not self._waiting:
                return []
            shape = self._waiting[0].shape
            batch = [piece for piece in self._waiting if piece.shape == shape][: self._limits.batch]
            taken = {piece.number for piece in batch}
            self._waiting = deque(piece for piece in self._waiting if piece.number not in taken)
            for piece in batch:
                job = self._owners[piece.number]
                job.began = job.began or time.monotonic()
            return batch

    def give_back(self, pieces: Sequence[Piece]) -> None:
        """Put pieces that were taken and not made in front of the others."""
        with self._change:
            self._waiting.extendleft(reversed([piece for piece in pieces if piece.number in self._owners]))
            self._change.notify()

    def tell(self, event: Event) -> None:
        """Pass on to its job what a worker says of a piece."""
        numbers = event.numbers if isinstance(event, Step) else (event.number,)
        with self._change:
            owners = [(number, self._owners.get(number)) for number in numbers]
            if isinstance(event, Made | Failed):
                self._owners.pop(event.number, None)
        for number, job in owners:
            if job is not None:
                job.add(_at(event, number - job.pieces[0].number))

    def cancel(self, job: Job) -> tuple[int, ...]:
        """End a job; returns the pieces that a worker is at, which may yet be told."""
        with self._change:
            numbers = {piece.number for piece in job.pieces}
            waiting = [piece.number for piece in self._waiting if piece.number in numbers]
            self._waiting = deque(piece for piece in self._waiting if piece.number not in numbers)
            making = tuple(sorted((numbers & self._owners.keys()) - set(waiting)))
        for number in (*waiting, *making):
            self.tell(Failed(number, "cancelled", "cancelled"))
        return making

    def close(self, message: str) -> None:
        """Take nothing more, and hand back what waits."""
        with self._change:
            self._is_closed = True
            waiting, self._waiting = list(self._waiting), deque[Piece]()
        for piece in waiting:
            self.tell(Failed(piece.number, "worker", message))


def _at(event: Event, place: int) -> Event:
    return replace(event, numbers=(place,)) if isinstance(event, Step) else replace(event, number=place)
