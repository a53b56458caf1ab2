"""Streams and events of the pretended device (`pretended`), in the place of those of `torch.cuda`.

Each stream counts what is put on it, and has a clock: of every stream, how much has certainly ended before what is put
on this one next. Events carry clocks from stream to stream; where the host waits for a stream, all that it puts on any
stream afterwards comes after what that stream knows.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeAlias
from unittest.mock import patch

import torch

Clock: TypeAlias = dict[str, int]


class Owner(Protocol):
    """The pretended device, as far as streams need it."""

    log: Any

    def device(self, given: Any) -> torch.device: ...


class Stream:
    """`torch.cuda.Stream`."""

    def __init__(self, streams: "Streams", device: torch.device, name: str) -> None:
        self._streams, self.device, self.name = streams, device, name
        self.clock: Clock = {name: 0}

    def wait_event(self, event: "Event") -> None:
        self._streams.owner.log.streams.append(("wait", event.name, self.name))
        _merge(self.clock, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = self._streams.event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._streams.owner.log.synchronisations.append("synchronize")
        self._streams.host_waits([self])

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, streams: "Streams", name: str) -> None:
        self._streams, self.name = streams, name
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = self._streams.current() if stream is None else stream
        self._streams.owner.log.streams.append(("record", self.name, stream.name))
        self.clock = dict(stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (self._streams.current() if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        self._streams.owner.log.synchronisations.append("synchronize")
        _merge(self._streams.host, self.clock)


class Streams:
    """All streams, and which is the current one of each device.

    Attributes:
        index: The current CUDA device.
        host: The clock of the host.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.index = 0
        self.host: Clock = {}
        self._all: dict[str, Stream] = {}
        self._current: dict[torch.device, Stream] = {}
        self._events = 0

    def install(self, stack: ExitStack) -> None:
        """Replaces what `torch.cuda` has, until the stack is closed."""
        replaced = {
            "current_device": lambda: self.index,
            "current_stream": self.current,
            "default_stream": self.default,
            "Stream": self.stream,
            "Event": self.event,
            "stream": self.using,
            "set_stream": self.set_stream,
            "device": self.using_device,
            "synchronize": self.synchronize,
        }
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        streams = self

        def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
            streams.owner.log.streams.append(("record_stream", hex(tensor.data_ptr()), stream.name))

        stack.enter_context(patch.object(torch.Tensor, "record_stream", record_stream))

    def _new(self, device: torch.device, name: str) -> Stream:
        return self._all.setdefault(name, Stream(self, device, name))

    def _device(self, device: Any) -> torch.device:
        return self.owner.device("cuda" if device is None else device)

    def stream(self, device: Any = None, priority: int = 0) -> Stream:
        place = self._device(device)
        return self._new(place, f"{place} stream {len(self._all)}")

    def event(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        self._events += 1
        return Event(self, f"event {self._events}")

    def default(self, device: Any = None) -> Stream:
        place = self._device(device)
        return self._new(place, f"{place} default")

    def current(self, device: Any = None) -> Stream:
        place = self._device(device)
        return self._current.get(place) or self.default(place)

    def set_stream(self, stream: Stream | None) -> None:
        if stream is not None:
            self._current[stream.device] = stream
            if stream.device.type == "cuda":
                self.index = stream.device.index

    @contextmanager
    def using(self, stream: Stream | None) -> Iterator[None]:
        index, before = self.index, None if stream is None else self.current(stream.device)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)
            self.index = index

    @contextmanager
    def using_device(self, device: Any) -> Iterator[None]:
        before = self.index
        self.index = before if device is None else self._device(device).index
        try:
            yield
        finally:
            self.index = before

    def synchronize(self, device: Any = None) -> None:
        place = self._device(device)
        self.owner.log.synchronisations.append("synchronize")
        self.host_waits(stream for stream in self._all.values() if stream.device == place)

    def tick(self, name: str) -> Clock:
        """Puts something on a stream; returns what comes before it, itself included."""
        clock = _merge(self._all[name].clock, self.host)
        clock[name] += 1
        return clock

    def host_waits(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            _merge(self.host, stream.clock)


def _merge(clock: Clock, other: Clock) -> Clock:
    for name, count in other.items():
        clock[name] = max(clock.get(name, 0), count)
    return clock
