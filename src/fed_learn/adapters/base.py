"""What the library needs to know of a framework: its tensors, to average them, and its models, to read and load."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from fed_learn.weights import Array


@dataclass(frozen=True, eq=False)
class Variable:
    """One variable of a model.

    Attributes:
        name: Its name in the weight dict.
        shape: Its shape.
        dtype: Its dtype as numpy has it.
        tensor: The framework's own object; the model's, not a copy.
        trainable: Whether training changes it; None where that cannot be known, as of a torch `state_dict`.
        role: A parameter, or a buffer that training only keeps account in (BatchNorm); None where it is not known.
        identity: Equal for two names of one variable (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    tensor: Any
    trainable: bool | None
    role: Literal["parameter", "buffer"] | None
    identity: object


class Adapter(Protocol):
    """The models of one framework. Whatever is told of a model depends on its architecture alone."""

    name: str
    """That of the `Framework`, if its models hold such tensors."""
    models: str
    """What it takes, in a few words, for messages."""

    def accepts(self, model: object) -> bool:
        """Whether this is a model of the framework. It imports nothing: without the framework there is no model."""

    def variables(self, model: Any) -> list[Variable]:
        """The variables, in an order that does not change.

        Raises:
            ModelError: The model has no variables yet; says what to do.
            DtypeError, WeightsTypeError: A variable that cannot be averaged, or has no values.
        """

    def get(self, variable: Variable, *, copy: bool) -> Array:
        """Its value: the caller's own, or without a copy where that can be, and read-only."""

    def load(self, model: Any, values: Mapping[str, tuple[Variable, Any]]) -> Any:
        """Copies values into the variables, and returns the model, or a new one where models cannot be changed.

        Args:
            model: The model.
            values: By name the variable and its new value, an array (of any strides and byte order, perhaps
                read-only) or a tensor of the framework `name`. Names, shapes and dtypes have been checked.

        Raises:
            ModelError: A variable cannot be written to; nothing has been.
        """


def given(array: Array, *, copy: bool) -> Array:
    """What `Adapter.get` returns, of an array that shares memory with a variable.

    Example:
        >>> given(np.zeros(2), copy=False).flags.writeable
        False
    """
    if copy:
        return np.array(array)
    view = array.view()
    view.flags.writeable = False
    return view


class Framework(Protocol):
    """The tensors of one framework. Tensors are `Any` here, since none of their types can be named."""

    name: str

    def tensor_type(self) -> type | None:
        """The class of its tensors; None as long as the framework has not been imported."""

    def check(self, tensor: Any, contributor: str, name: str) -> np.dtype[Any]:
        """The dtype of a tensor that can be averaged.

        Raises:
            DtypeError: Its dtype cannot be averaged.
            WeightsTypeError: It is no plain block of memory with values in it.
        """

    def device(self, tensor: Any) -> str:
        """Where it lies: `"cpu"` for the memory of the host."""

    def view(self, tensor: Any, contributor: str | None = None, name: str | None = None) -> Array:
        """An array that shares the memory of a tensor on the CPU; a copy of one on another device.

        Raises:
            WeightsTypeError: Its memory cannot be had.
        """

    def tensor(self, array: Array, device: str = "cpu") -> Any:
        """The reverse: a tensor that shares the memory of the array, or a copy on another device."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Any:
        """A new contiguous tensor."""

    def contiguous(self, tensor: Any) -> Any:
        """The tensor without its gradient, contiguous: the same memory where it is so already, else a copy."""

    def write(self, target: Any, source: Any) -> None:
        """Copies an array or a tensor into a tensor, past its gradient."""

    def overlaps_itself(self, tensor: Any) -> bool:
        """Whether several elements share memory, so that it cannot be written to."""

    def span(self, tensor: Any) -> tuple[int, int]:
        """The addresses at which its memory begins and ends."""

    def first_not_finite(self, tensor: Any) -> tuple[tuple[int, ...], float] | None:
        """Index and value of the first NaN or infinity, if there is one."""

    def magnitude(self, tensor: Any) -> int:
        """The largest absolute value of integers; 0 for an empty tensor and for anything else."""

    def overflowed(self, tensor: Any) -> Any:
        """Which elements look like the mean of a sum that overflowed: not finite, or the largest float64."""
