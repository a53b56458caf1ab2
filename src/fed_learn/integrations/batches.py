"""How examples are put into batches, so that it depends on the seed and the round alone; and means over examples."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


def shuffled(count: int, batch_size: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Indices of all examples in a random order, a batch each.

    A last example that would be alone joins the batch before it: BatchNorm cannot be trained on one example.

    Example:
        >>> [len(batch) for batch in shuffled(9, 4, np.random.default_rng(0))]
        [4, 5]
    """
    order = rng.permutation(count)
    ends = list(range(batch_size, count, batch_size))
    if ends and count - ends[-1] == 1:
        ends.pop()
    return np.split(order, ends)


def in_order(count: int, batch_size: int) -> Iterator[slice]:
    """Slices over all examples, a batch each.

    Example:
        >>> list(in_order(5, 3))
        [slice(0, 3, None), slice(3, 5, None)]
    """
    return (slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size))


def check_batch_size(batch_size: int) -> None:
    """Refuses what is no size of a batch.

    Raises:
        ValueError: It is not at least 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


def check_repeatable(data: Any) -> None:
    """Refuses an iterator, which would be empty the second time.

    Raises:
        TypeError: `data` is an iterator, or cannot be iterated over.
    """
    if isinstance(data, Iterator):
        raise TypeError(f"data is a {type(data).__name__}, which can be read once only; give what can be read again")
    if not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}, which yields no batches")


def pair_of(batch: Any) -> tuple[Any, Any]:
    """A batch as inputs and targets.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else "")
        raise TypeError(f"a batch must be (inputs, targets), not {what}")
    return batch[0], batch[1]


def score_name(metric: Any) -> str:
    """What a metric is called.

    Example:
        >>> score_name("accuracy"), score_name(len)
        ('accuracy', 'len')
    """
    if isinstance(metric, str):
        return metric
    name = getattr(metric, "name", None) or getattr(metric, "__name__", None)
    return name if isinstance(name, str) else type(metric).__name__


class Mean:
    """A mean over examples, of batches of different sizes.

    Example:
        >>> mean = Mean()
        >>> mean.add(1.0, 3)
        >>> mean.add(0.0, 1)
        >>> mean.value()
        0.75
    """

    def __init__(self) -> None:
        self.count = 0
        self._total = 0.0

    def add(self, value: float, count: int) -> None:
        """Adds the mean of a batch of `count` examples."""
        self._total += value * count
        self.count += count

    def value(self) -> float:
        """The mean so far.

        Raises:
            ValueError: There was no example.
        """
        if not self.count:
            raise ValueError("there are no examples in the data")
        return self._total / self.count
