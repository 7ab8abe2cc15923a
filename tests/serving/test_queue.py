"""The queue alone: order, batches, limits, cancelling."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from latentdiff.request.options import OPTIONS
from latentdiff.serving.asked import NAMES, OTHERWISE
from latentdiff.serving.queue import Closed, Full, Queue
from latentdiff.serving.settings import Limits
from latentdiff.serving.work import Draw, Failed, Made, Piece, Preview, Step

PLAIN = Draw(model="m", prompt="a cat")


@pytest.fixture
def queue() -> Queue:
    return Queue(Limits(queue=10, batch=4))


def made(piece: Piece) -> Made:
    return Made(piece.number, b"", 8, 8, "{}", "")


def test_equal_shapes_go_together_and_others_wait(queue):
    first = queue.submit(PLAIN, [1, 2])
    other = queue.submit(replace(PLAIN, width=64), [3])
    alike = queue.submit(replace(PLAIN, prompt="a dog", negative_prompt="a fox"), [4, 5, 6])
    assert [piece.seed for piece in queue.take()] == [1, 2, 4, 5]
    assert [piece.seed for piece in queue.take()] == [3]
    assert [piece.seed for piece in queue.take()] == [6]
    assert queue.take(0.0) == [] and queue.jobs == [first, other, alike]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"width": 8},
        {"options": {"steps": 3}},
        {"tags": ("x",)},
        {"lenient": True},
        {"image": b"an image"},
    ],
)
def test_what_cannot_be_in_one_batch(queue, change):
    queue.submit(PLAIN, [1])
    queue.submit(replace(PLAIN, **change), [2])
    assert len(queue.take()) == 1


def test_edits_go_with_those_of_the_same_request_alone(queue):
    edit = replace(PLAIN, image=b"an image")
    queue.submit(edit, [1, 2])
    queue.submit(replace(edit), [3])
    assert [piece.seed for piece in queue.take()] == [1, 2]


def test_limits(queue):
    queue.submit(PLAIN, range(8))
    with pytest.raises(Full):
        queue.submit(PLAIN, range(3))
    queue.submit(PLAIN, range(2))
    queue.take()
    queue.submit(PLAIN, range(4))


def test_a_job_is_over_when_its_last_image_is(queue):
    job = queue.submit(PLAIN, [1, 2])
    one, two = queue.take()
    queue.tell(Step((one.number, two.number), 1, 2))
    assert job.progress == 0.5
    queue.tell(made(two))
    assert not job.is_over and job.progress == 0.75 and queue.in_making == 1
    queue.tell(made(one))
    assert job.is_over and [image.number for image in job.made] == [0, 1] and queue.in_making == 0


def test_cancelling_ends_what_waits_and_what_is_made(queue):
    job, next_job = queue.submit(PLAIN, range(6)), queue.submit(PLAIN, [9])
    taken = queue.take()
    assert queue.cancel(job) == tuple(piece.number for piece in taken)
    assert job.is_over and job.failure.kind == "cancelled"
    queue.tell(made(taken[0]))  # which the worker sends before it has heard of it
    assert job.made == []
    assert [piece.seed for piece in queue.take()] == [9] and not next_job.is_over


def test_closing_hands_back_what_waits(queue):
    job = queue.submit(PLAIN, range(6))
    queue.take()
    queue.close("the server is stopping")
    assert len(job.ends) == 2 and job.failure.message == "the server is stopping"
    with pytest.raises(Closed):
        queue.submit(PLAIN, [1])


def test_what_a_dead_worker_had_comes_first_and_alone(queue):
    queue.submit(PLAIN, [1, 2, 3])
    taken = queue.take()
    queue.submit(PLAIN, [4])
    queue.give_back([piece.alone() for piece in taken])
    assert [[piece.seed for piece in queue.take()] for _ in range(4)] == [[1], [2], [3], [4]]


def test_whoever_watches_late_hears_what_counts(queue):
    job = queue.submit(PLAIN, [1, 2])
    one, two = queue.take()
    queue.tell(Preview(one.number, 0, b"old"))
    queue.tell(made(one))
    queue.tell(Preview(two.number, 0, b"new"))

    async def watch() -> list[object]:
        events = []
        async for event in job.events():
            events.append(event)
            if isinstance(event, Preview):  # now the rest happens, in another thread
                threading.Thread(target=queue.tell, args=(Failed(two.number, "internal", "no"),)).start()
        return events

    found = asyncio.run(asyncio.wait_for(watch(), 10))
    assert [type(event) for event in found] == [Made, Preview, Failed] and found[1].png == b"new"


def test_every_option_that_a_command_has_is_a_field():
    left = set(OPTIONS) - set(NAMES) - set(OTHERWISE)
    assert left == {name for name, option in OPTIONS.items() if option.flags == ()} - set(OTHERWISE)
