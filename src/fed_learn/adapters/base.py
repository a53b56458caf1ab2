"""What the library needs to know of a framework: its tensors, to average them, and its models, to read and load."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from fed_learn.errors import DtypeError, FedLearnError, WeightsTypeError
from fed_learn.policies import Role
from fed_learn.weights import SUPPORTED_DTYPES, Array, same_bits

ONLY = "; only= chooses the others"
"""What to do where one variable of a model cannot be averaged."""
STATISTICS = frozenset(
    (
        *("running_mean", "running_var"),
        *("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev", "mean", "variance"),
        *("min_val", "max_val", "zero_point", "observer_enabled", "fake_quant_enabled"),
    )
)
"""What layers of torch and Keras call the statistics that they keep of what passes through them.

Among them what observers of quantization find, and switches of these, which a plan of training turns on and off.
"""
DTYPES = {dtype.name: dtype for dtype in SUPPORTED_DTYPES}


@dataclass(frozen=True, eq=False)
class Variable:
    """One variable of a model.

    Attributes:
        name: Its name in the weight dict.
        shape: Its shape.
        dtype: Its dtype as numpy has it.
        tensor: The framework's own object; the model's, not a copy.
        trainable: Whether training changes it; None where that cannot be known, as of a torch `state_dict`.
        role: What it is to the model, from which its policy follows; None where nobody can know. A frozen parameter is
            `"trained"`, and not trainable.
        identity: Equal for two names of one variable (tied weights), which has one value under both.
        problem: Why it cannot be averaged or read, to be raised if it is asked for; None for all others.
        grows: Whether its value to load may have another shape, which the model takes or refuses.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    tensor: Any
    trainable: bool | None
    role: Role | None
    identity: object
    problem: FedLearnError | None = None
    grows: bool = False


Form: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]
"""The shape and dtype of a tensor."""


class Adapter(Protocol):
    """The models of one framework. Whatever is told of a model depends on its architecture alone.

    It may also have a method `hint(missing, extra)`, which says in a sentence what to do when these names are missing
    and too many, or returns an empty string; and a method `views(model, chosen)`, which reads a plain model at once:
    the names for which `chosen` is true (None: all), as `get` gives each without a copy, or None for a model in which
    anything is out of the ordinary. Then `variables` and `get` say what is wrong, or do what takes longer. A method
    `trained(model)` says of each parameter by its name whether training changes it, or that it is frozen; and a method
    `left(model, chosen)` what a model keeps that cannot travel as numbers, in words, each a noun with its place; such
    a model is out of the ordinary too.
    """

    name: str
    """That of the `Framework`, if its models hold such tensors."""
    models: str
    """What it takes, in a few words, for messages."""

    def accepts(self, model: object) -> bool:
        """Whether this is a model of the framework. It imports nothing: without the framework there is no model."""

    def variables(self, model: Any) -> list[Variable]:
        """The variables, in an order that does not change.

        Raises:
            ModelError: The model has no variables yet, or two of one name; says what to do.
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
            TiedVariablesError: Variables share memory, and their values differ there; nothing has been written.
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
    view.setflags(write=False)
    return view


def role_of_buffer(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], finite: Callable[[], bool]) -> Role:
    """The role of a variable that belongs to a layer, and that no optimizer changes.

    Args:
        name: What the layer calls it.
        shape: Its shape.
        dtype: Its dtype.
        finite: Whether all its values are numbers, asked only where it matters: a mask has infinities.

    Example:
        >>> role_of_buffer("num_batches_tracked", (), np.dtype("int64"), lambda: True)
        'counter'
        >>> role_of_buffer("mask", (8, 8), np.dtype("float32"), lambda: False)
        'constant'
    """
    if name in STATISTICS:
        return "statistic"
    if dtype.kind in "biu":
        return "counter" if not shape and dtype.kind != "b" else "constant"
    setting = name in ("eps", "mask") or name.endswith("_mask")
    return "statistic" if not setting and finite() else "constant"


def role_of_any(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, trained: bool) -> Role | None:
    """The role of a variable of which no layer tells more than its name; None: it may be anything.

    Args:
        name: What it is called, without the path.
        shape: Its shape.
        dtype: Its dtype; integers are not trained, whatever is said of them.
        trained: Whether it is told that it is.

    Example:
        >>> float32, int64 = np.dtype("float32"), np.dtype("int64")
        >>> role_of_any("w", (2,), float32, trained=False), role_of_any("steps", (), int64, trained=True)
        (None, 'counter')
    """
    if dtype.kind in "biu":
        return role_of_buffer(name, shape, dtype, lambda: True)
    return "trained" if trained else "statistic" if name in STATISTICS else None


def averageable(dtype: str, name: str) -> tuple[np.dtype[Any], DtypeError | None]:
    """The dtype of this name as numpy has it, and what is wrong with it.

    Args:
        dtype: As in `"bfloat16"`.
        name: The variable that has it.

    Example:
        >>> averageable("float8_e4m3fn", "w")[1]
        DtypeError("model: 'w' has dtype float8_e4m3fn, which cannot be averaged; only= chooses the others")
    """
    known = DTYPES.get(dtype)
    if known is not None:
        return known, None
    return np.dtype(np.void), not_averageable(dtype, "model", name, ONLY)


def not_averageable(dtype: object, contributor: str, name: str, hint: str = "") -> DtypeError:
    """The error for a dtype that no kernel takes; the hint follows the text."""
    message = f"{contributor}: {name!r} has dtype {dtype}, which cannot be averaged{hint}"
    return DtypeError(message, contributor=contributor, name=name, dtype=dtype, expected=None)


def checked(framework: "Framework", tensor: Any, name: str) -> tuple[np.dtype[Any], FedLearnError | None]:
    """The dtype of a model's tensor, and why it cannot be read or averaged.

    Args:
        framework: Whose it is.
        tensor: A variable of a model.
        name: What it is called there.
    """
    try:
        return framework.check(tensor, "model", name), None
    except DtypeError as error:
        return np.dtype(np.void), not_averageable(error.dtype, "model", name, ONLY)
    except WeightsTypeError as error:
        return np.dtype(np.void), error


class Framework(Protocol):
    """The tensors of one framework. Tensors are `Any` here, since none of their types can be named."""

    name: str

    @property
    def resident(self) -> "Resident | None":
        """The same, if a kernel computes with its tensors themselves; None: they always go the way of arrays."""

    def tensor_type(self) -> type | tuple[type, ...] | None:
        """The class or classes of its tensors, and of what stands for one without values; None as long as the framework
        has not been imported.
        """

    def check(self, tensor: Any, contributor: str, name: str) -> np.dtype[Any]:
        """The dtype of a tensor that can be averaged.

        Raises:
            DtypeError: Its dtype cannot be averaged.
            WeightsTypeError: It is no plain block of memory with values in it.
        """

    def dtype(self, tensor: Any) -> np.dtype[Any] | None:
        """Its dtype as numpy has it, with or without values; None if it cannot be averaged."""

    def device(self, tensor: Any) -> str:
        """Where it is averaged: `"cpu"` where it goes the way of arrays, else the device where it lies and stays."""

    def placement(self, tensor: Any) -> Any:
        """What `tensor()` takes to put an array where this tensor lies: a str, if it means the same everywhere."""

    def view(self, tensor: Any, contributor: str | None = None, name: str | None = None) -> Array:
        """An array that shares the memory of a tensor on the CPU; a read-only copy of one on another device.

        One of a tensor on the CPU is read-only if the tensor is not to be written to in that way.

        Raises:
            WeightsTypeError: Its memory cannot be had.
        """

    def tensor(self, array: Array, placement: Any = None) -> Any:
        """The reverse. What lies on the CPU may share the memory of the array, which is left alone from then on.

        Args:
            array: Contiguous, in native byte order.
            placement: As from `placement()`; None: the CPU, or what is usual in the framework.
        """

    def code(self, tensor: Any) -> str | None:
        """What it is, in a few words, if it holds codes, that have no mean: packed weights, random keys; else None."""
        return None

    def alike(self, one: Any, other: Any) -> bool:
        """Whether two tensors have the same shape, dtype and bits, also such as cannot be averaged."""
        return same_bits(self.view(one), self.view(other))

    def copied(self, tensor: Any) -> Any:
        """The same values in memory that nobody else changes."""
        return tensor

    def unwritable(self, tensor: Any) -> str | None:
        """Why nothing can be written to it, in words that follow its name."""

    def write(self, target: Any, source: Any) -> None:
        """Copies an array or a tensor into a tensor, past its gradient."""


class Resident(Framework, Protocol):
    """A framework with tensors that stay on their device: the torch kernel computes with them where they lie."""

    def empty(self, forms: Mapping[str, Form], devices: Mapping[str, str]) -> dict[str, Any]:
        """New contiguous tensors, by name.

        Args:
            forms: Their shapes and dtypes.
            devices: Where they are to lie.
        """

    def empty_slab(self, forms: Mapping[str, Form], device: str) -> dict[str, Any]:
        """New tensors of these shapes and dtypes; those of one dtype lie one after the other in one piece of memory.

        They are for use within the library: whoever pickles one of them pickles all of the memory.
        """

    def contiguous(self, tensor: Any) -> Any:
        """The tensor without its gradient, contiguous: the same memory where it is so already, else a copy."""

    def changed(self, tensor: Any) -> None:
        """Tells the framework, whose gradients may need the values before, that a tensor was written to."""

    def span(self, tensor: Any) -> tuple[int, int]:
        """The addresses at which its memory begins and ends."""

    def on_host(self, tensors: Mapping[str, Any]) -> dict[str, Array]:
        """Copies of tensors as arrays, in one transfer from each device, but for large tensors."""

    def moved(self, value: Any, device: str) -> Any:
        """A tensor or an array as a tensor on another device; the same tensor where it lies there already."""

    def lacks(self, device: str) -> str | None:
        """Why there is no such device in this process, in a few words; None: there is."""

    def mark(self, devices: Iterable[str]) -> Any:
        """A mark in the work that this thread has given to devices so far, for `wait`."""

    def wait(self, mark: Any, tensors: Collection[Any]) -> None:
        """Lets the work that this thread gives to devices from now on begin after a mark.

        Args:
            mark: What `mark` returned, in this thread or another.
            tensors: What that work was about, whose memory is not to be used again before the work to come is done.
        """

    def first_not_finite(self, tensor: Any) -> tuple[tuple[int, ...], float] | None:
        """Index and value of the first NaN or infinity, if there is one."""

    def magnitude(self, tensor: Any) -> int:
        """The largest absolute value of integers; 0 for an empty tensor and for anything else."""

    def magnitudes(self, tensors: Mapping[str, Any]) -> dict[str, int]:
        """That of each of some tensors, by one transfer from each device for all small ones."""

    def overflowed(self, tensor: Any) -> Any:
        """Which elements look like the mean of a sum that overflowed: not finite, or the largest float64."""

    def put(self, tensor: Any, mask: Any, values: Any) -> None:
        """Replaces the elements of a tensor where a mask is true."""
