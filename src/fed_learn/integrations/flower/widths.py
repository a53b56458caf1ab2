"""Replies of several precisions where no global model says which is due: the widest, which holds all the others."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from fed_learn.aggregation.told import Told
from fed_learn.contribution import Contribution
from fed_learn.weights import FLOATS, FrozenWeights, WeightDict


class Widths:
    """The widest floating-point dtype of each variable in the replies of a round.

    Args:
        told: Says things once in the job.
    """

    def __init__(self, told: Told) -> None:
        self._told = told
        self._widest: dict[str, np.dtype[Any]] = {}

    def forget(self) -> None:
        """Another round begins."""
        self._widest = {}

    def note(self, replies: Iterable[WeightDict]) -> None:
        """Looks at all replies of a round."""
        found: dict[str, set[np.dtype[Any]]] = {}
        for weights in replies:
            for name, array in weights.items():
                if array.dtype in FLOATS:
                    found.setdefault(name, set()).add(array.dtype)
        self._widest = {name: widest_of(dtypes) for name, dtypes in found.items() if len(dtypes) > 1}

    def widened(self, sent: Contribution) -> Contribution:
        """A contribution in the widest dtypes."""
        if not self._widest:
            return sent
        given = sent.weights or {}
        narrow = [
            name
            for name, array in given.items()
            if name in self._widest and array.dtype in FLOATS and array.dtype != self._widest[name]
        ]
        if not narrow:
            return sent
        first, who = narrow[0], sent.contributor
        self._told.once(
            ("widened", who),
            f"{who}: {first!r} came as {given[first].dtype} and is taken as {self._widest[first]}, as others send it",
        )
        wider = {name: array.astype(self._widest[name]) if name in narrow else array for name, array in given.items()}
        return replace(sent, weights=FrozenWeights.adopt(wider))


def widest_of(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The narrowest floating-point dtype that holds every number of some.

    Example:
        >>> widest_of(map(np.dtype, ("float16", "float32")))
        dtype('float32')
    """
    different = set(dtypes)
    largest = max(different, key=lambda dtype: (dtype.itemsize, str(dtype)))
    halves = sum(dtype.itemsize == largest.itemsize for dtype in different) > 1  # float16 and bfloat16
    return np.dtype(np.float32) if halves else largest
