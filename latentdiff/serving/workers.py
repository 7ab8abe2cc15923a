"""The server's side of the workers: starting them, handing batches over, and starting them again when they die."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

from latentdiff.serving import work
from latentdiff.serving.queue import Queue
from latentdiff.serving.settings import WorkerSettings

log = logging.getLogger(__name__)

PATIENCE = (0.0, 5.0, 30.0)  # seconds before a worker that dies at once is started again
TICK = 0.5  # seconds


def run_worker(connection: Connection, settings: WorkerSettings, device: str) -> None:
    """What the new process does; only there is torch loaded."""
    from latentdiff.serving.worker import main

    main(connection, settings, device)


class Workers:
    """One for each device.

    Args:
        observe: told of all that workers say, for metrics.
        broken: told why a worker cannot work at all.
    """

    def __init__(
        self,
        queue: Queue,
        settings: WorkerSettings,
        devices: Sequence[str],
        observe: Callable[[object], object] = lambda message: None,
        broken: Callable[[str], object] = lambda message: None,
    ) -> None:
        on_cpu = sum(device in ("cpu", "auto") for device in devices)
        if on_cpu > 1 and settings.threads is None:
            settings = replace(settings, threads=max(1, (os.cpu_count() or 1) // on_cpu))
        self.loaded: dict[str, work.Loaded] = {}
        self.queue, self._observe, self._broken = queue, observe, broken
        self._all = [_Worker(self, settings, device) for device in devices]

    def start(self) -> None:
        """Start them; returns at once."""
        for worker in self._all:
            worker.thread.start()

    @property
    def ready(self) -> list[str]:
        """The devices of those that can work."""
        return [worker.device_name for worker in self._all if worker.is_ready]

    @property
    def restarts(self) -> int:
        """How often one has died."""
        return sum(worker.deaths for worker in self._all)

    @property
    def processes(self) -> list[int]:
        """The process ids of those that live."""
        return [worker.process.pid for worker in self._all if worker.process and worker.process.pid]

    def cancel(self, numbers: Sequence[int]) -> None:
        """Tell whoever is at these pieces."""
        self._tell_all(work.Cancel(tuple(numbers)))

    def peek(self, number: int) -> None:
        """Ask for a preview of a piece that is being made."""
        self._tell_all(work.Peek(number))

    def stop(self, grace: float) -> None:
        """Let them finish what they are at, for so many seconds, and end them."""
        for worker in self._all:
            worker.stopping.set()
        for worker in self._all:
            worker.thread.join(grace)
        for worker in self._all:
            worker.end()

    def heard(self, message: object) -> None:
        """Pass on what a worker says."""
        match message:
            case work.Step() | work.Preview() | work.Made() | work.Failed():
                self.queue.tell(message)
            case work.Loaded(name):
                self.loaded[name] = message
            case work.Broken(reason):
                self._broken(reason)
        self._observe(message)

    def _tell_all(self, message: work.Cancel | work.Peek) -> None:
        for worker in self._all:
            worker.tell(message)


class _Worker:
    """One process, and the thread of the server that looks after it."""

    def __init__(self, workers: Workers, settings: WorkerSettings, device: str) -> None:
        self._workers, self._settings, self._device = workers, settings, device
        self._sending = threading.Lock()
        self._connection: Connection | None = None
        self.process: multiprocessing.process.BaseProcess | None = None
        self.thread = threading.Thread(target=self._look_after, name=f"worker {device}", daemon=True)
        self.stopping = threading.Event()
        self.is_ready = False
        self.device_name = device
        self.deaths = 0

    def tell(self, message: object) -> None:
        """Send something, if the worker lives."""
        with self._sending:
            if self._connection is not None:
                try:
                    self._connection.send(message)
                except OSError:
                    pass  # it has died, which its thread will see

    def end(self) -> None:
        """Let the process go, at once if need be."""
        if self.process is not None:
            self.tell(None)
            self.process.join(2.0)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
        with self._sending:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _look_after(self) -> None:
        in_a_row = 0
        while not self.stopping.is_set():
            self._start()
            batch: list[work.Piece] = []
            try:
                if not self._is_told(work.Ready):
                    return
                in_a_row = 0
                while not self.stopping.is_set():
                    if batch := self._workers.queue.take(TICK):
                        self.tell(batch)
                        self._is_told(work.Done)
                        batch = []
                    elif not (self.process and self.process.is_alive()):
                        raise EOFError
            except (EOFError, OSError):
                self.is_ready = False
                self._after_death(batch)
                if not self.stopping.is_set():
                    log.warning("the worker on %s has died and is started again", self._device)
                    self.deaths += 1
                    self.stopping.wait(PATIENCE[min(in_a_row, len(PATIENCE) - 1)])
                    in_a_row += 1

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.process = context.Process(
            target=run_worker, args=(theirs, self._settings, self._device), daemon=True, name=f"worker {self._device}"
        )
        self.process.start()
        theirs.close()
        with self._sending:
            if self._connection is not None:
                self._connection.close()
            self._connection = ours

    def _is_told(self, kind: type) -> bool:
        """Listen until the worker says this; False if it cannot work, or does not yet and shall stop."""
        assert self._connection is not None
        while True:
            while not self._connection.poll(TICK):
                if self.stopping.is_set() and not self.is_ready:
                    return False
            message = self._connection.recv()
            if isinstance(message, work.Ready):
                self.is_ready, self.device_name = True, message.device
            self._workers.heard(message)
            if isinstance(message, kind):
                return True
            if isinstance(message, work.Broken):
                return False

    def _after_death(self, batch: list[work.Piece]) -> None:
        """Have pieces made once more, each alone; one that was alone may be what kills workers."""
        for piece in batch:
            if piece.is_alone:
                self._workers.heard(work.Failed(piece.number, "worker", "the worker died while it made the image"))
        self._workers.queue.give_back([piece.alone() for piece in batch if not piece.is_alone])
