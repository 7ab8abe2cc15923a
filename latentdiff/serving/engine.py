"""What all interfaces draw with: the catalogue, the queue and the workers of one server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import Request

from latentdiff.serving.asked import check
from latentdiff.serving.catalogue import Catalogue
from latentdiff.serving.errors import Refused, of_failure
from latentdiff.serving.metrics import Metrics
from latentdiff.serving.queue import Closed, Full, Job, Queue
from latentdiff.serving.settings import ServerSettings
from latentdiff.serving.work import Draw, Loaded, Made
from latentdiff.serving.workers import Workers

STOPPING = "the server is stopping; ask another one, or this one later"
LOOK = 0.5  # seconds between looks at whether a client is still there


class Engine:
    """Takes draws and gives jobs.

    Attributes:
        fault: why the workers cannot work, "" if they can.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.catalogue = Catalogue(settings)
        self.metrics = Metrics()
        self.queue = Queue(settings.limits)
        self.fault = ""
        self.workers = Workers(
            self.queue, settings.worker, settings.devices, observe=self.metrics.observe, broken=self._broken
        )
        self.metrics.watch(self.queue, self.workers)

    def submit(self, draw: Draw, seeds: Sequence[int]) -> Job:
        """Take a request on.

        Raises:
            Refused: it is beyond the limits, or cannot be taken on now.
        """
        facts = self.facts(draw.model)
        draw = check(draw, len(seeds), self.catalogue, self.limits, *([facts.size] if facts else []))
        if self.fault:
            raise Refused(503, self.fault, code="worker_unavailable")
        try:
            return self.queue.submit(draw, seeds)
        except Full:
            raise Refused(
                429, f"{len(self.queue)} images wait already; try again later", code="rate_limit_exceeded", retry_after=2
            ) from None
        except Closed:
            raise Refused(503, STOPPING, code="server_stopping", retry_after=10) from None

    async def finish(self, job: Job, request: Request) -> list[Made]:
        """Wait for all images of a job; it is cancelled when its client is gone.

        Raises:
            Refused: one of them was not made.
        """
        await self.wait(job, request)
        if (failure := job.failure) is not None:
            self.cancel(job)
            raise of_failure(failure)
        return job.made

    async def wait(self, job: Job, request: Request) -> None:
        """Wait until a job is over, or the first of its images has failed; cancel it when its client is gone."""
        end = asyncio.ensure_future(_first_failure_or_end(job))
        try:
            while not end.done():
                await asyncio.wait([end], timeout=LOOK)
                if not end.done() and await request.is_disconnected():
                    self.cancel(job)
        finally:
            end.cancel()
            if not job.is_over:
                self.cancel(job)

    def cancel(self, job: Job) -> None:
        """Make the images of a job no further."""
        if making := self.queue.cancel(job):
            self.workers.cancel(making)

    def facts(self, name: str) -> Loaded | None:
        """What is known of a model once a worker has loaded it."""
        return self.workers.loaded.get(name)

    def _broken(self, message: str) -> None:
        self.fault = message
        self.queue.close(message)


async def _first_failure_or_end(job: Job) -> None:
    async for _ in job.events():
        if job.failure is not None:
            return
