"""The contributions that wait to be added to sums, and the memory for copies of them."""

from typing import Any

from fed_learn.aggregation.outputs import new_values
from fed_learn.aggregation.tensors import Place
from fed_learn.weights import Array, Schema

MOST_BORROWED = 10
"""Borrowed contributions that wait to be added at most: the sums are read and written once for all of them, and the
native kernel reads as many in one sweep."""
MOST_COPIED = 2
"""Copies of contributions that wait to be added at most: two in one pass save the time that making them takes."""


class Waiting:
    """Contributions in the order in which they came, each either borrowed, or a copy, or to be added at once.

    What is borrowed is left as it is by whoever lends it; a copy lies in memory that is made once (`room_for`) and used
    again after those before have been added.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[list[Any], float]] = []  # the values of each contribution, and its aggregation weight
        self._copied = 0
        self._rooms: list[tuple[bool, dict[str, Any]]] = []  # whether on devices, and the memory of a copy

    def __len__(self) -> int:
        return len(self._rows)

    def room_for(self, arrays: dict[str, Array], place: Place | None) -> dict[str, Any]:
        """Memory for a copy of the next contribution, by name.

        Args:
            arrays: Arrays of the same shapes and dtypes.
            place: Where tensors are to lie; None for arrays.
        """
        on_devices = place is not None and place.resident is not None
        if self._copied == len(self._rooms) or self._rooms[self._copied][0] is not on_devices:
            self._rooms[self._copied :] = [(on_devices, new_values(Schema.of(arrays), place))]
        return self._rooms[self._copied][1]

    def put(self, values: list[Any], aggregation_weight: float, *, borrowed: bool, copied: bool) -> bool:
        """Lets a contribution wait.

        Args:
            values: An array or tensor per variable.
            aggregation_weight: By which it counts.
            borrowed: Whether it may wait as it is.
            copied: Whether the values are in what `room_for` gave.

        Returns:
            Whether all that waits has to be added now.
        """
        self._rows.append((values, aggregation_weight))
        self._copied += copied
        if borrowed:
            return len(self._rows) >= MOST_BORROWED
        # A copy waits beside copies alone: whoever ceases to borrow may change what was borrowed.
        return not (copied and len(self._rows) == self._copied < MOST_COPIED)

    def columns(self) -> tuple[list[list[Any]], list[float]]:
        """The values of all that waits, a list for each variable; and the aggregation weights."""
        values, aggregation_weights = zip(*self._rows, strict=True)
        return list(map(list, zip(*values, strict=True))), list(aggregation_weights)

    def values(self) -> list[Any]:
        """The arrays and tensors of all that waits, and the memory for copies."""
        rooms = [value for _, room in self._rooms for value in room.values()]
        return [*rooms, *(value for values, _ in self._rows for value in values)]

    def clear(self) -> None:
        """All that waited has been added; the memory of copies is kept for the next ones."""
        self._rows.clear()
        self._copied = 0
