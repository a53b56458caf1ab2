"""Tensors of a framework straight into the averages: the same kind comes out, on the same device.

`opened` takes a weight dict apart: it puts an array in the place of each tensor, so that checks and kernels that know
arrays alone can go on, and keeps the tensors beside them. A tensor on the CPU is shown as a *view*, which shares its
memory. One that is averaged on another device is shown as a *placeholder*: an array of its shape and dtype that takes
no memory and holds no values. A framework is *resident* (`fed_learn.adapters.base.Resident`) if a kernel computes with
its tensors where they lie, as the torch kernel does with those of torch. A `Place` says where a result is to lie, and
as whose tensors.

What is taken, and what comes back:

- torch: any dense tensor; tensors without gradients.
- TensorFlow: eager tensors and `tf.Variable`s; eager tensors, which `variable.assign` takes.
- JAX: concrete arrays, also sharded ones; arrays with the sharding of the first contribution's.
- `keras.Variable`s: what Keras's back end holds in them, which is one of these.

Tensors on the CPU are viewed as arrays without a copy and go the way of arrays, whatever the kernel. On another device

- those of torch stay there: the torch kernel averages them (`kernel="native"` or `"numpy"` is an error), their float64
  sums lie beside them, and what is checked of names, shapes and dtypes is checked on placeholders. Each variable has a
  device of its own, the CPU for some of them if need be; a contribution whose variable lies elsewhere than the first
  one's is refused, or moved by `device=`. What goes by way of copies in the memory of the host: `exact=True`, 64-bit
  integers too large for float64 sums, and aggregation weights more than 2**800 apart.
- those of torch on a device without float64 (`mps`, some `xpu`), and those of TensorFlow and JAX, are copied to the
  host, and the result is put where each variable of the first contribution was; where the others lie does not matter.
  A stream that was unpickled has forgotten the devices of JAX arrays, and puts its result on the default one.

Arrays, and tensors of any framework that go the way of arrays, mix freely; the result is tensors where those of the
first contribution are, in the framework of its first tensor. Of `like=` only names, shapes and dtypes are read: it may
also hold tensors on the meta device, `jax.ShapeDtypeStruct`s and `tf.TensorSpec`s. `out=` is written to in place,
gradients or not, and returned; TensorFlow's tensors and JAX arrays cannot be, but variables can.

Example:
    >>> import torch
    >>> from fed_learn import weighted_average
    >>> clients = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    >>> mean = weighted_average([model.state_dict() for model in clients], [300, 100])
    >>> clients[0].load_state_dict(mean)
    <All keys matched successfully>
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import index
from typing import Any, Self, TypeAlias

import numpy as np

from fed_learn import kernels
from fed_learn.adapters.base import Framework, Resident, not_averageable
from fed_learn.adapters.tensors import FRAMEWORKS, framework_of, hold_tensors, plain
from fed_learn.aggregation.arrays import ARRAYS
from fed_learn.errors import WeightsTypeError, a_type, brief
from fed_learn.kernels.base import Kernel
from fed_learn.ties import one_array_for_one_memory
from fed_learn.weights import PLAIN, Array, Schema, WeightDict, as_weight_dict, items_of, native_dtype

Tensors: TypeAlias = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Place:
    """Where tensors lie, and whose they are.

    Attributes:
        framework: Whose they are.
        devices: By name where those are averaged that are not on the CPU; see `Framework.device`.
        placements: By name where each of them lies; see `Framework.placement`.
    """

    framework: Framework
    devices: Mapping[str, str]
    placements: Mapping[str, Any]

    @property
    def resident(self) -> Resident | None:
        """The framework, if tensors of it stay where they are, and some are not on the CPU."""
        return self.framework.resident if self.devices else None

    def only(self, names: Collection[str]) -> "Place":
        """The place of some of the tensors."""
        devices = {name: device for name, device in self.devices.items() if name in names}
        return Place(self.framework, devices, {n: where for n, where in self.placements.items() if n in names})

    def on_host(self) -> "Place":
        """The same tensors on the CPU."""
        return Place(self.framework, {}, dict.fromkeys(self.placements, "cpu"))

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        there = {name: where for name, where in self.placements.items() if isinstance(where, str)}
        return Place, (self.framework, self.devices, there)


@dataclass(eq=False)  # frozen ones take ten times as long to make
class OpenedWeights:
    """A weight dict as the checks take it; left as it is from then on.

    Attributes:
        weights: Arrays in the place of tensors: views or copies of those that are averaged on the CPU, placeholders
            of the others. What is no tensor is left as it is, for the checks to judge.
        tensors: The tensors.
        owners: Their frameworks.
        devices: By name where those are averaged that are not on the CPU.
    """

    weights: Any
    tensors: Tensors
    owners: dict[str, Framework]
    devices: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The first device on which something is averaged that is not the CPU; that, if there is none."""
        return next(iter(self.devices.values()), "cpu")

    @property
    def place(self) -> Place | None:
        """Where a result like these lies, as the first tensor says; None: they are arrays, and so is the result."""
        if not self.owners:
            return None
        framework = next(iter(self.owners.values()))
        own = (name for name, owner in self.owners.items() if owner is framework)
        return Place(framework, self.devices, {name: framework.placement(self.tensors[name]) for name in own})

    @property
    def values(self) -> dict[str, Any]:
        """What a kernel computes with that takes tensors: those that are not on the CPU, and arrays of the others."""
        values: dict[str, Any] = self.weights
        return values | {name: self.tensors[name] for name in self.devices} if self.devices else values

    def on_host(self) -> Any:
        """The weights without placeholders: copies of tensors that are not on the CPU."""
        if not self.devices:
            return self.weights
        tensors = {name: self.tensors[name] for name in self.devices}
        return self.weights | look_at(next(iter(tensors.values()))).on_host(tensors)

    # Where names are dropped or values replaced, arrays and tensors stay in step.

    def only(self, names: Collection[str]) -> "OpenedWeights":
        """Some of the weights, or all of them in another order."""
        if len(names) == len(self.weights) and list(names) == list(self.weights):
            return self
        tensors = {name: self.tensors[name] for name in names if name in self.tensors}
        owners = {name: self.owners[name] for name in tensors}
        devices = {name: self.devices[name] for name in tensors if name in self.devices}
        return OpenedWeights({name: self.weights[name] for name in names}, tensors, owners, devices)

    def replaced(self, arrays: Mapping[str, Array], given: Any = None) -> "OpenedWeights":
        """Weights of some of these variables, in which some arrays are others.

        Args:
            arrays: The weights, in order.
            given: What they have been made of, see `on_host`; None: `weights`. What is another array than there
                becomes a tensor where a tensor was.
        """
        given = self.weights if given is None else given
        changed = {name: array for name, array in arrays.items() if array is not given.get(name)}
        held = self.only(arrays)
        if not changed:
            return held
        made: Tensors = {}
        if self.place is not None:
            made = as_tensors({name: array for name, array in changed.items() if name in self.owners}, self.place)
        weights = {**held.weights, **{name: array for name, array in changed.items() if name not in made}}
        for name in made:
            array = changed[name]
            weights[name] = placeholder(array.shape, array.dtype) if name in self.devices else array
        return OpenedWeights(weights, held.tensors | made, held.owners, held.devices)

    def as_sent(self, sent: Any) -> Any:
        """The weights in the form in which they came: what was sent itself, if nothing of it has been changed."""
        values = {**self.weights, **self.tensors} if self.tensors else self.weights
        same = list(sent) == list(values) and all(sent[name] is value for name, value in values.items())
        return sent if same else values

    def not_finite(self, kernel: Kernel) -> list[str]:
        """Names of the variables in which a kernel finds a NaN or an infinity; that of a device, where there is one."""
        kernel = kernels.resolve("auto", device=self.device) if self.devices else kernel
        flags = kernel.not_finite([look_at(value).contiguous(value) for value in self.values.values()])
        return [name for name, flag in zip(self.weights, flags, strict=True) if flag]


def opened(weights: object, who: str, device: str | None = None) -> OpenedWeights:
    """Opens what should be a weight dict: arrays, tensors, or references with a method `materialize()` that loads one.

    Args:
        weights: The weights.
        who: What errors call their sender.
        device: Where to move what lies elsewhere; None: it stays where it is.

    Raises:
        WeightsTypeError: A tensor is no dense block of memory with values.
        DtypeError: A tensor has a dtype that cannot be averaged.
        NamesError: There are more variables, or longer names, than any model has.
    """
    if not isinstance(weights, Mapping):
        return OpenedWeights(weights, {}, {})
    arrays = weights if type(weights) in PLAIN else items_of(weights, who)  # read once: what is checked is what is kept
    if device is None and set(map(type, arrays.values())) <= {np.ndarray}:  # the usual case
        return OpenedWeights(arrays, {}, {})
    arrays = items_of(arrays, who)
    tensors: Tensors = {}
    owners: dict[str, Framework] = {}
    devices: dict[str, str] = {}
    known: dict[type, Framework | None] = {np.ndarray: None}
    for name, value in arrays.items():
        if type(value) not in known:
            value = arrays[name] = _loaded(plain(value))
        kind = type(value)
        if kind not in known:
            known[kind] = framework_of(kind)
        framework = known[kind]
        if framework is None:
            continue
        dtype, there = framework.check(value, who, name), framework.device(value)
        tensors[name], owners[name] = value, framework
        if there == "cpu":
            arrays[name] = framework.view(value, who, name)
        else:
            devices[name] = there
            arrays[name] = placeholder(value.shape, dtype)
    held = OpenedWeights(arrays, tensors, owners, devices)
    return held if device is None else _moved(held, device)


def _moved(held: OpenedWeights, device: str) -> OpenedWeights:
    """The weights on a device: arrays and tensors as tensors of torch, arrays and tensors on the CPU as they are."""
    if device == "cpu":
        arrays = held.on_host()
        made = {name: held.owners[name].tensor(np.array(arrays[name])) for name in held.devices}
        return OpenedWeights(arrays, held.tensors | made, held.owners)
    framework = _resident()
    arrays, tensors, owners = dict(held.weights), dict(held.tensors), dict(held.owners)
    devices: dict[str, str] = {}
    for name, array in held.weights.items():
        if not isinstance(array, np.ndarray | np.generic):
            continue
        value = held.tensors[name] if held.owners.get(name) is framework else np.asarray(array)
        tensors[name], owners[name] = framework.moved(value, device), framework
        devices[name] = framework.device(tensors[name])
        arrays[name] = placeholder(array.shape, native_dtype(array.dtype))
    return OpenedWeights(arrays, tensors, owners, devices)


def device_named(device: object) -> str | None:
    """The name of a device that a caller gives: as text or as torch has it, or None.

    Raises:
        ValueError: There is no such device here.

    Example:
        >>> device_named("cpu:0"), device_named(None)
        ('cpu', None)
    """
    if device is None:
        return None
    name = str(device)
    if name.partition(":")[0] == "cpu":
        return "cpu"
    problem = why_not_there(name)
    if problem is not None:
        raise ValueError(f"device {name!r} cannot be used: {problem}")
    framework = _resident()
    return framework.device(framework.moved(np.zeros(0, np.float32), name))  # with its number


def why_not_there(device: str) -> str | None:
    """Why nothing can be averaged on a device of this name here, in a few words; None: it can."""
    return _resident().lacks(device)


def _resident() -> Resident:
    """The framework whose tensors stay on their devices."""
    return next(framework.resident for framework in FRAMEWORKS if framework.resident is not None)


def as_tensors(weights: WeightDict, place: Place) -> Tensors:
    """Tensors of arrays, which nobody else holds: on the CPU they may share their memory."""
    where = place.placements
    return {name: place.framework.tensor(array, where.get(name)) for name, array in weights.items()}


def without_tensors(weights: Any, who: str) -> Any:
    """What should be a weight dict, with arrays in the place of tensors: views of those on the CPU, copies of others.

    Tensors of one place on the CPU, as a `state_dict` has them of a tied parameter, become one array.

    Raises:
        WeightsTypeError, DtypeError, NamesError: See `opened`.
    """
    held = opened(weights, who)
    arrays = held.on_host()
    return arrays | one_array_for_one_memory({name: arrays[name] for name in held.tensors}) if held.tensors else arrays


def schema_of(weights: object, who: str) -> Schema:
    """The schema of a weight dict of arrays or tensors, wherever they lie, and whether they have values or not.

    Raises:
        WeightsTypeError, DtypeError: It is none.
    """
    usual = type(weights) in PLAIN and set(map(type, weights.values())) <= {np.ndarray}  # type: ignore[attr-defined]
    return Schema.of(as_weight_dict(weights if usual else placeholders(weights, who), who), who)


def placeholders(weights: Any, who: str) -> Any:
    """What should be a weight dict, with placeholders of the same shape and dtype in the place of tensors.

    Only their shapes and dtypes are read, so they need have no values: on the meta device, a `jax.ShapeDtypeStruct`, a
    `tf.TensorSpec`. What is no tensor is left as it is, for the checks to judge.

    Raises:
        DtypeError: A tensor has a dtype that cannot be averaged.
        WeightsTypeError: It has no definite shape.
    """
    if not hold_tensors(weights):
        return weights
    shown = items_of(weights, who)
    for name, value in shown.items():
        tensor = plain(value)
        framework = framework_of(type(tensor))
        if framework is None:
            continue
        dtype = framework.dtype(tensor)
        if dtype is None:
            raise not_averageable(tensor.dtype, who, name)
        try:
            shape = tuple(map(index, tensor.shape))
        except (RuntimeError, TypeError, ValueError) as error:
            message = f"{who}: {name!r} is {a_type(type(tensor))} without a definite shape"
            raise WeightsTypeError(message, contributor=who, name=name) from error
        shown[name] = placeholder(shape, dtype)
    return shown


def look_at(value: Any) -> Any:
    """What tells of a value what it holds: `ARRAYS`, or the framework of a tensor."""
    if isinstance(value, np.ndarray):
        return ARRAYS
    framework = framework_of(type(value))
    assert framework is not None
    return framework.resident


def magnitudes(values: Mapping[str, Any]) -> dict[str, int]:
    """The largest absolute values of arrays and tensors of integers."""
    tensors = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
    found = {name: ARRAYS.magnitude(value) for name, value in values.items() if name not in tensors}
    found |= look_at(next(iter(tensors.values()))).magnitudes(tensors) if tensors else {}
    return {name: found[name] for name in values}


def label_of(contributor: Any) -> str:
    """What an error calls a contributor whose name may not even be text."""
    return str.__str__(contributor) if issubclass(type(contributor), str) else brief(contributor)


def check_devices(devices: Mapping[str, str], expected: Mapping[str, str], who: str) -> None:
    """Refuses weights of which a variable lies on another device than in what came before.

    Args:
        devices: Of each variable that is not on the CPU.
        expected: Those that came before.
        who: Whose the weights are.

    Raises:
        WeightsTypeError: Names the variable.
    """
    if devices == expected:
        return
    for name in [*expected, *devices]:
        here, there = devices.get(name, "cpu"), expected.get(name, "cpu")
        if here != there:
            raise WeightsTypeError(
                f"{who}: {name!r} is on {here}, and what comes before on {there}; a variable that is averaged lies on "
                "one device (device= of weighted_average and Accumulator moves it)",
                contributor=who,
                name=name,
                device=here,
                expected=there,
            )


@lru_cache(maxsize=10_000)
def placeholder(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that takes no memory, for all that have its shape and dtype."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _loaded(value: Any) -> Any:
    """The value, loaded if it is a reference to one that lies elsewhere, such as on disk."""
    kind = type(value)
    load = None if hasattr(kind, "dtype") else getattr(kind, "materialize", None)
    return load(value) if callable(load) else value
