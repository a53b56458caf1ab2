"""What the library needs to know of a framework to average its tensors."""

from typing import Any, Protocol

import numpy as np

from fed_learn.weights import Array


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
