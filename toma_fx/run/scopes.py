"""Values that hold for what runs inside a `with`, be it a thread, a coroutine or a generator.

A context variable alone is not enough: a generator that sets one leaves it to whoever resumes it,
and does not find it again when another thread does. So the frame that the `with` stands in counts
first, nearest first, wherever it runs; the context variable serves the tasks and threads that were
started inside.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

_ENTERED: ContextVar[Mapping[int, Any]] = ContextVar("toma_fx_entered", default={})  # noqa: B039
"""Values by the identity of their `Scopes`; a mapping in it is never changed."""
_NOTHING = object()
_RESUMED = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_SUSPENDABLE = _RESUMED | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE


class Scopes(Generic[T]):
    """A value, and others in its place inside a `with`.

    Attributes:
        default: the value outside.
    """

    def __init__(self, default: T) -> None:
        self.default = default
        self._frames: dict[FrameType, tuple[T, ...]] = {}

    def enter(self, value: T) -> Entered[T]:
        """A context manager: inside, `current` is `value`."""
        return Entered(self, value)

    def current(self) -> T:
        """The value that holds where this is called."""
        if self._frames:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                values = self._frames.get(frame)
                if values:
                    return values[-1]
                frame = frame.f_back
        return cast(T, _ENTERED.get().get(id(self), self.default))

    def forget(self, value: T) -> None:
        """Drop a value whose `with` was left by an interrupt, before it could do so itself."""
        for frame, values in list(self._frames.items()):
            if any(each is value for each in values):
                self._set(frame, tuple(each for each in values if each is not value))
        entered = dict(_ENTERED.get())
        if entered.get(id(self), _NOTHING) is value:
            del entered[id(self)]
            _ENTERED.set(entered)

    def _set(self, frame: FrameType, values: tuple[T, ...]) -> None:
        if values:
            self._frames[frame] = values
        else:
            self._frames.pop(frame, None)


class Entered(Generic[T]):
    """A value of `Scopes` while its `with` lasts."""

    def __init__(self, scopes: Scopes[T], value: T) -> None:
        self._scopes, self._value = scopes, value
        self._entries: list[tuple[FrameType, Any]] = []

    def __enter__(self) -> T:
        scopes, frame = self._scopes, find_owner(sys._getframe(1))
        outer = _ENTERED.get()
        self._entries.append((frame, outer.get(id(scopes), _NOTHING)))
        try:
            scopes._frames[frame] = (*scopes._frames.get(frame, ()), self._value)
            if _has_own_context(frame):  # else whoever resumes it would see the value too
                _ENTERED.set({**outer, id(scopes): self._value})
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self._value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        scopes, value = self._scopes, self._value
        frame, outer = self._entries.pop()
        values = scopes._frames.get(frame, ())
        at = max((i for i, each in enumerate(values) if each is value), default=len(values))
        scopes._set(frame, (*values[:at], *values[at + 1 :]))
        entered = dict(_ENTERED.get())
        # elsewhere (a generator that another thread ends) the variable is not this one's to change
        if entered.get(id(scopes), _NOTHING) is value:
            del entered[id(scopes)]
            _ENTERED.set(entered if outer is _NOTHING else {**entered, id(scopes): outer})


def find_owner(frame: FrameType) -> FrameType:
    """The frame whose `with` is being entered: not one of contextlib, nor a generator it drives."""
    while (outer := frame.f_back) is not None:
        driven = frame.f_code.co_flags & _RESUMED and _is_contextlib(outer)
        if not driven and not _is_contextlib(frame):
            break
        frame = outer
    return frame


def _has_own_context(frame: FrameType) -> bool:
    """Whether context variables that a frame sets stay with it: not in what others resume.

    A coroutine has a context of its own where it is (part of) a task.
    """
    if not frame.f_code.co_flags & _SUSPENDABLE:
        return True
    asyncio = sys.modules.get("asyncio")
    if frame.f_code.co_flags & _RESUMED or asyncio is None:
        return False
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no event loop runs
        return False


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_code.co_filename == contextlib.__file__


@dataclass(frozen=True)
class Flow:
    """Who calls.

    Attributes:
        thread: identity of the thread. frames: of the generators and coroutines around the call.
    """

    thread: int
    frames: frozenset[int]

    @classmethod
    def current(cls) -> Flow:
        """That of whoever calls this."""
        return cls(threading.get_ident(), _suspendable_frames())

    def is_that_of(self, other: Flow) -> bool:
        """Whether both are the same work: a generator may go on in another thread."""
        return self.frames == other.frames and (bool(self.frames) or self.thread == other.thread)

    def may_continue(self, other: Flow) -> bool:
        """Whether this may be a later part of the same work."""
        return self.is_that_of(other) or bool(self.frames & other.frames)


def _suspendable_frames() -> frozenset[int]:
    """Identities of the generators and coroutines among the callers of whoever calls this.

    They tell work that is interleaved in one thread, or goes on in another, from other work.
    """
    frames: set[int] = set()
    outer: FrameType | None = sys._getframe(1)
    while outer is not None:
        if outer.f_code.co_flags & _SUSPENDABLE:
            frames.add(id(outer))
        outer = outer.f_back
    return frozenset(frames)
