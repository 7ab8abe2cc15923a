"""Threads that use one model: several at once where that changes nothing in it, one at a time where it does.

Taps, adapters, other forwards, weights that come and go and repairs in float32 are changes of modules that all threads
see. Whoever makes them is alone with the model for the whole of its call, so that an image is made by one state of it.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from latentdiff.errors import UsageError
from latentdiff.prompts.tags import TAG

Function = TypeVar("Function", bound=Callable[..., Any])


class Sharing:
    """Who uses a model. Threads come in the order in which they asked; one that is in may ask again.

    Args:
        changes: whether any use of the model changes it as it is now; each is alone then.

    Attributes:
        is_forked: this process was forked from the one that made this.
        is_spoilt: likewise, while another thread changed the model.
    """

    def __init__(self, changes: Callable[[], bool]) -> None:
        self._changes = changes
        self.is_forked = self.is_spoilt = False
        self._begin({})
        _all.add(self)

    def _begin(self, inside: dict[int, int]) -> None:
        self._moment = threading.Condition()
        self._inside = inside  # how often each thread has entered
        self._alone: int | None = None  # the thread that is, until it has left altogether
        self._line: deque[object] = deque()
        self._is_clearing = False  # one that is in waits for the others to leave

    @contextmanager
    def entered(self, *, alone: bool) -> Iterator[None]:
        """Inside, no other thread changes the model; alone, none uses it.

        Raises:
            UsageError: two threads that are in wait for one another to be alone.
        """
        me = threading.get_ident()
        with self._moment:
            if me not in self._inside:
                self._wait_in_line(me, alone)
            elif alone and self._alone != me:
                self._wait_for_others(me)
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._moment:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._alone = None if self._alone == me else self._alone
                    self._moment.notify_all()

    def claim(self) -> bool:
        """Be alone from now on, if no other thread is in; says whether that is so."""
        me = threading.get_ident()
        with self._moment:
            if self._inside.keys() - {me}:
                return False
            self._alone = me if me in self._inside else None
            return True

    def _wait_in_line(self, me: int, alone: bool) -> None:
        place = object()
        self._line.append(place)
        try:
            self._moment.wait_for(lambda: self._line[0] is place and self._may_enter(alone))
            self._alone = me if alone or self._changes() else None
        finally:
            self._line.remove(place)
            self._moment.notify_all()

    def _may_enter(self, alone: bool) -> bool:
        if not self._inside:
            return True
        return self._alone is None and not self._is_clearing and not alone and not self._changes()

    def _wait_for_others(self, me: int) -> None:
        if self._is_clearing:
            raise UsageError(
                "two threads that are drawing both want to change the model; change it before drawing, or put both into "
                "`with pipe.alone():`"
            )
        self._is_clearing = True
        try:
            self._moment.wait_for(lambda: self._inside.keys() == {me})
            self._alone = me
        finally:
            self._is_clearing = False
            self._moment.notify_all()

    def after_fork(self) -> None:
        """Of all threads only the one that forked is here."""
        me = threading.get_ident()
        self.is_forked, self.is_spoilt = True, self.is_spoilt or self._alone not in (None, me)
        self._begin({thread: times for thread, times in self._inside.items() if thread == me})


_all: weakref.WeakSet[Sharing] = weakref.WeakSet()


def _after_fork() -> None:
    for sharing in list(_all):
        sharing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_CHANGING = ("controls", "image_prompts", "seamless", "pag_scale", "seg_scale", "freeu")  # options


def one_use(*, alone: bool = False) -> Callable[[Function], Function]:
    """Make a method of a model, or a function whose first argument is one, a single use of it.

    It is alone if that is said here, or if its arguments say that it puts something on the modules: a cache, LoRAs
    that prompts name or that the model has for few steps, ControlNets and IP-Adapters, whose weights come and go.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(model: Any, *arguments: Any, **named: Any) -> Any:
            with model.in_use(alone=alone or _changes_modules(model, arguments, named)):
                return function(model, *arguments, **named)

        return cast(Function, call)

    return decorate


def _changes_modules(model: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> bool:
    if named.get("fast") and getattr(model, "distilled", None):
        return True
    if named.get("cache_interval") not in (None, 1) or any(named.get(name) for name in _CHANGING):
        return True
    given = (*arguments, *named.values())
    texts = [text for value in given for text in (value if isinstance(value, (list, tuple)) else [value])]
    return any(TAG.search(text) for text in texts if isinstance(text, str))
