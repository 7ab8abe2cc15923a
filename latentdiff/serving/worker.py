"""A worker: a process that holds the models on one device and makes what it is sent, until the server's end closes."""

from __future__ import annotations

import io
import os
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Cancelled
from latentdiff.errors import DataError, LatentDiffError, UsageError
from latentdiff.image import to_pil
from latentdiff.pipeline import Pipeline
from latentdiff.serving import work
from latentdiff.serving.drawing import as_file, drawn, walk_length
from latentdiff.serving.models import Models
from latentdiff.serving.settings import WorkerSettings

GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # what talking to a server that has ended gives


def main(connection: Connection, settings: WorkerSettings, device: str) -> None:
    """Serve one connection. A worker whose server has ended ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the server, which asks the workers to stop
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        models = Models(settings, device, connection.send)
        first = models[next(iter(settings.models))]
    except (LatentDiffError, OSError) as error:
        connection.send(work.Broken(str(error)))
        return
    try:
        connection.send(work.Ready(str(first.device)))
        while (pieces := connection.recv()) is not None:
            if isinstance(pieces, list):  # not what was meant for the batch that has just ended
                make(connection, models, pieces)
                connection.send(work.Done())
    except GONE:
        os._exit(0)


def make(connection: Connection, models: Models, pieces: Sequence[work.Piece]) -> None:
    """Make pieces together; where that fails, each alone, so that one does not take the others with it."""
    watch = Watch(connection, models, pieces)
    try:
        pipe = models[pieces[0].draw.model]
        watch.begin(pipe)
        for piece, image in zip(pieces, drawn(pipe, pieces, watch, models), strict=True):
            file = as_file(image, piece.draw.suffix, piece.draw.quality)
            texts = image.info["latentdiff"], image.info["parameters"]
            connection.send(work.Made(piece.number, file, *image.size, *texts))
    except GONE:
        raise
    except Cancelled:
        _fail(connection, pieces, "cancelled", "cancelled")
    except Exception as error:
        if len(pieces) > 1:
            for piece in pieces:
                make(connection, models, [piece])
        elif isinstance(error, UsageError | DataError):
            _fail(connection, pieces, "request", str(error))
        elif isinstance(error, LatentDiffError):
            _fail(connection, pieces, "internal", str(error))
        else:
            traceback.print_exc()
            _fail(connection, pieces, "internal", "the image could not be made; the server's log says why")


def _fail(connection: Connection, pieces: Sequence[work.Piece], kind: work.FailureKind, message: str) -> None:
    for piece in pieces:
        connection.send(work.Failed(piece.number, kind, message))


class Watch:
    """The callback of a batch: tells of steps, sends previews, and listens to what the server wants meanwhile."""

    def __init__(self, connection: Connection, models: Models, pieces: Sequence[work.Piece]) -> None:
        self._connection, self._models, self._pieces = connection, models, pieces
        self._numbers = tuple(piece.number for piece in pieces)
        self._cancelled: set[int] = set()
        self._wanted: set[int] = set()
        self._done = 0

    def begin(self, pipe: Pipeline) -> None:
        """Say by which model they are made."""
        self._pipe = pipe
        self._steps = walk_length(pipe, self._pieces[0].draw)

    def __call__(self, step: int, t: float, x0: Tensor) -> bool:
        """See `latentdiff.diffusion.denoise.Callback`."""
        self._done += 1  # the repeats of a step, too
        self._connection.send(work.Step(self._numbers, min(self._done, self._steps), self._steps))
        while self._connection.poll():
            self._heed(self._connection.recv())
        for place, piece in enumerate(self._pieces):
            index = preview_due(self._done, self._steps, piece.draw.previews)
            if index is not None or piece.number in self._wanted:
                self._wanted.discard(piece.number)
                self._connection.send(work.Preview(piece.number, index, self._png(x0[place : place + 1])))
        return not self._cancelled.issuperset(self._numbers)

    def _heed(self, message: work.Cancel | work.Peek | None) -> None:
        match message:
            case work.Cancel(numbers):
                self._cancelled.update(numbers)
            case work.Peek(number):
                self._wanted.add(number)
            case _:  # the server stops and waits no longer
                raise EOFError

    def _png(self, latents: Tensor) -> bytes:
        file = io.BytesIO()
        to_pil(self._models.preview(self._pipe, latents))[0].save(file, "PNG", compress_level=1)
        return file.getvalue()


def preview_due(done: int, steps: int, previews: int) -> int | None:
    """Which of so many previews, spread evenly over the steps, belongs after this one; the last step needs none."""
    due = [index for index in range(previews) if done == (index + 1) * steps // (previews + 1)]
    return due[-1] if due and done < steps else None
