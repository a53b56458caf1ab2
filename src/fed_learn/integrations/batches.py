"""How examples are put into batches, so that it depends on the seed and the round alone; how many there are in one; and
means over examples.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fed_learn.errors import a_type


def shuffled(count: int, batch_size: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Indices of all examples in a random order, a batch each.

    A last example that would be alone joins the batch before it: BatchNorm cannot be trained on one example. Where all
    are to be alone, it is.

    Example:
        >>> [len(batch) for batch in shuffled(9, 4, np.random.default_rng(0))]
        [4, 5]
        >>> [len(batch) for batch in shuffled(3, 1, np.random.default_rng(0))]
        [1, 1, 1]
    """
    order = rng.permutation(count)
    ends = list(range(batch_size, count, batch_size))
    if batch_size > 1 and ends and count - ends[-1] == 1:
        ends.pop()
    return np.split(order, ends)


def in_order(count: int, batch_size: int) -> Iterator[slice]:
    """Slices over all examples, a batch each.

    Example:
        >>> list(in_order(5, 3))
        [slice(0, 3, None), slice(3, 5, None)]
    """
    return (slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size))


def check_repeatable(data: Any) -> None:
    """Refuses an iterator, which would be empty the second time.

    Raises:
        TypeError: `data` is an iterator, or cannot be iterated over.
    """
    if isinstance(data, Iterator):
        raise TypeError(f"data is {a_type(type(data))}, which can be read once only; give what can be read again")
    if not isinstance(data, Iterable):
        raise TypeError(f"data is {a_type(type(data))}, which yields no batches")


def pair_of(batch: Any) -> tuple[Any, Any]:
    """A batch as inputs and targets.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = a_type(type(batch)) + (f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else "")
        raise TypeError(f"a batch must be (inputs, targets), not {what}")
    return batch[0], batch[1]


def tensors_in(part: Any) -> Iterator[Any]:
    """The tensors and arrays of inputs, targets or outputs, which may be in dicts, lists and tuples.

    Example:
        >>> [array.shape for array in tensors_in(({"a": np.zeros(2)}, np.zeros((2, 3)), "name"))]
        [(2,), (2, 3)]
    """
    if isinstance(part, Mapping):
        for item in part.values():
            yield from tensors_in(item)
    elif isinstance(part, list | tuple):
        for item in part:
            yield from tensors_in(item)
    elif hasattr(part, "shape"):
        yield part


def form_of(part: Any) -> Any:
    """Shapes in the place of tensors, and types in that of anything else, for messages.

    Example:
        >>> form_of({"a": np.zeros((2, 3)), "b": [np.zeros(2), "name"]})
        {'a': (2, 3), 'b': [(2,), 'str']}
    """
    if isinstance(part, Mapping):
        return {key: form_of(item) for key, item in part.items()}
    if isinstance(part, list | tuple):
        return [form_of(item) for item in part]
    return tuple(part.shape) if hasattr(part, "shape") else type(part).__name__


def count_of(inputs: Any, targets: Any) -> int:
    """How many examples a batch has.

    It is the first dimension of the targets, which all of them share where there are several in a tuple, list or dict.
    A list (or tuple) of dicts, or of what is no tensor, has an item for each example. Where the targets do not tell,
    the inputs do.

    Raises:
        ValueError: They disagree, or there is nothing to count.

    Example:
        >>> count_of(np.zeros((8, 3)), (np.zeros(8), {"boxes": np.zeros((8, 4))}))
        8
        >>> count_of(np.zeros((2, 3)), [{"boxes": np.zeros((5, 4))}, {"boxes": np.zeros((7, 4))}])
        2
    """
    for what, part in (("targets", targets), ("inputs", inputs)):
        counts = sorted(set(_counts(part)))
        if len(counts) > 1:
            raise ValueError(
                f"the {what} of a batch disagree on how many examples it has, {' or '.join(map(str, counts))}: "
                f"{form_of(part)}"
            )
        if counts:
            return counts[0]
    raise ValueError(f"a batch has nothing to count: inputs {form_of(inputs)} and targets {form_of(targets)}")


def _counts(part: Any) -> Iterator[int]:
    if isinstance(part, Mapping):
        for item in part.values():
            yield from _counts(item)
    elif isinstance(part, list | tuple):
        if all(isinstance(item, Mapping) for item in part) or all(not len(t.shape) for t in tensors_in(part)):
            if any(item is not None for item in part):
                yield len(part)
        else:
            for item in part:
                yield from _counts(item)
    elif hasattr(part, "shape") and len(part.shape):
        yield int(part.shape[0])


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
