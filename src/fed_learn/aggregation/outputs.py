"""Where results go: new memory, the arrays or tensors of `out=`, or what a stack writes its messages from.

A kernel writes to the `arrays` of an `Output`, and `finish` makes the result of them. Which it is depends on what the
result consists of and what the kernel writes to:

- `ArrayOutputs`: the result is arrays;
- `ViewOutputs`: the result is tensors, and the kernel writes to arrays, which are made tensors or copied into them;
- `DeviceOutputs`: the result is tensors that are not all on the CPU, and the kernel writes to these where they lie
  (see `tensors`), and to arrays in the place of the others.

Nothing is written to that shares memory with an input or with another output, or that its owner has made read-only.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from fed_learn.adapters.base import Resident
from fed_learn.adapters.overlaps import overlaps_itself
from fed_learn.adapters.tensors import hold_tensors, plain
from fed_learn.aggregation.arrays import Columns, bounds_of, contiguous
from fed_learn.aggregation.tensors import OpenedWeights, Place, Tensors, as_tensors, opened
from fed_learn.errors import OutputError
from fed_learn.kernels.memory import Table, addresses
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict

ALIGNMENT = 64
"""Bytes of a cache line, at which the arrays of a slab begin."""
SMALLEST_SLAB = 1 << 20
"""Bytes of a model from which on its new arrays share a slab."""


class Output(Protocol):
    """Where a result goes."""

    @property
    def arrays(self) -> Mapping[str, Any]:
        """What a kernel writes to, by name: contiguous arrays, or tensors of its own."""

    def finish(self) -> WeightDict:
        """The result, once all of it has been written."""


def outputs_for(
    schema: Schema,
    place: Place | None,
    out: Any,
    *,
    on_devices: bool = False,
    columns: Columns | None = None,
    inputs: Sequence[Any] = (),
) -> Output:
    """Where a result goes.

    Args:
        schema: Names, shapes and dtypes of the result.
        place: Where the result lies as tensors; None: it is arrays.
        out: A weight dict to write to, or None.
        on_devices: Whether the kernel writes to tensors that are not on the CPU where they lie; else to arrays alone.
        columns: Arrays that must not be written to; with `on_devices`, those of variables on the CPU.
        inputs: Tensors that must not be.

    Raises:
        ContributionError: `out` has other names, shapes or dtypes (one of its children).
        OutputError: It cannot be written to.
    """
    if on_devices and place is not None and place.resident is not None:
        return DeviceOutputs(schema, place, out, columns, inputs)
    if place is None and not inputs and not hold_tensors(out):
        return ArrayOutputs(schema, out, columns)
    return ViewOutputs(schema, place, out, columns, inputs)


class ArrayOutputs:
    """Results that are arrays: new ones, or those of `out=`.

    Args:
        schema: Names, shapes and dtypes of the result.
        out: A weight dict to write to, or None.
        inputs: What must not be written to.

    Raises:
        ContributionError: `out` has other names, shapes or dtypes (one of its children).
        OutputError: An array of `out` cannot be written to, or shares memory with an input, another or itself.

    Attributes:
        weights: The result, in the order of the schema; `out` itself where it was given.
        arrays: A contiguous array per name for the kernel to write to.
        table: Where those lie, and the inputs.
    """

    def __init__(self, schema: Schema, out: WeightDict | None, inputs: Columns | None = None) -> None:
        self.weights: WeightDict = new_arrays(schema) if out is None else out
        self.table = Table(schema, 0) if inputs is None else inputs.table
        own = dict(self.weights) if type(self.weights) is dict else {}  # holds the arrays, whatever becomes of `out`
        usual = self.table.gather([own], 0)  # each is as a kernel takes it; else they are checked one by one
        self.arrays: WeightDict = own if usual else self._checked(schema)
        if not usual:
            self.table.addresses[:, 0] = addresses(list(self.arrays.values()))
        self._in_place = usual or all(self.weights[name] is array for name, array in self.arrays.items())
        if out is not None:
            self._refuse_overlap(inputs)

    def _checked(self, schema: Schema) -> WeightDict:
        schema.check(as_weight_dict(self.weights, "out"), "out")
        for name, array in self.weights.items():
            if not isinstance(array, np.ndarray):
                raise OutputError(f"out: {name!r} is a scalar, not an array", name=name)
            if not array.flags.writeable:
                raise OutputError(f"out: {name!r} is read-only", name=name)
            if overlaps_itself(array.shape, array.strides, array.itemsize):
                raise OutputError(f"out: {name!r} overlaps itself: its elements share memory", name=name)
        # What a kernel cannot write to in place is filled by way of a copy.
        return {name: contiguous(self.weights[name]) for name in schema}

    def finish(self) -> WeightDict:
        """The result, once the arrays have been written."""
        for name, array in () if self._in_place else self.arrays.items():
            if array is not self.weights[name]:
                self.weights[name][...] = array
        return self.weights

    def _refuse_overlap(self, inputs: Columns | None) -> None:
        """Refuses an `out` two of whose arrays share memory, or one and an input.

        Arrays are compared by where their memory begins and ends, in the order of the beginnings: of two that overlap
        the second begins before the first ends.
        """
        copied = inputs is not None and inputs.copied
        if self._in_place and not copied and not self.table.may_overlap():
            return
        names = list(self.arrays)
        sizes = np.array([array.nbytes for array in self.arrays.values()], np.uintp)
        if self._in_place:
            starts, stops = self.table.addresses[:, 0], self.table.addresses[:, 0] + sizes
        else:
            starts, stops = bounds_of([self.weights[name] for name in names])
        order = np.argsort(starts)
        order = order[stops[order] > starts[order]]
        starts, stops = starts[order], stops[order]
        for i in np.flatnonzero(stops[:-1] > starts[1:]):
            one, other = names[order[i]], names[order[i + 1]]
            raise OutputError(f"out: {one!r} and {other!r} overlap in memory or interleave", name=one)
        if inputs is None or not order.size:
            return
        lows, highs = inputs.bounds(sizes)
        # The last output that begins before the input ends is the one that could reach into it.
        nearest = np.searchsorted(starts, highs) - 1
        for i in np.flatnonzero((nearest >= 0) & (stops[nearest] > lows) & (highs > lows)):
            name = names[order[nearest[i]]]
            raise OutputError(
                f"out: {name!r} overlaps an input in memory or interleaves with it, and inputs are never changed",
                name=name,
            )


def new_arrays(schema: Schema) -> dict[str, Array]:
    """New arrays. Large models lie in one piece of memory: many arrays would cost several times its page faults."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in schema.items()}
    if sum(sizes.values()) < SMALLEST_SLAB:
        return {name: np.empty(shape, dtype) for name, (shape, dtype) in schema.items()}
    ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()))
    slab = np.empty(ends[-1] + ALIGNMENT, np.uint8)
    slab = slab[-slab.ctypes.data % ALIGNMENT :]
    return {
        name: slab[start : start + sizes[name]].view(dtype).reshape(shape)
        for start, (name, (shape, dtype)) in zip([0, *ends], schema.items(), strict=False)
    }


def new_values(schema: Schema, place: Place | None) -> dict[str, Any]:
    """New arrays, or tensors where the place says so, for use within the library; their values are whatever was there.

    Tensors of one device and dtype lie in one piece of memory, so that a kernel takes them at once.
    """
    framework = None if place is None else place.resident
    if place is None or framework is None:
        return new_arrays(schema)
    values: dict[str, Any] = new_arrays(_part(schema, place.devices, there=False))
    for device in dict.fromkeys(place.devices.values()):
        here = {name: form for name, form in schema.items() if place.devices.get(name) == device}
        values |= framework.empty_slab(here, device)
    return {name: values[name] for name in schema}


def _part(schema: Schema, names: Collection[str], *, there: bool) -> Schema:
    """The variables of a schema that are among some names, or that are not."""
    return Schema({name: form for name, form in schema.items() if (name in names) is there})


def _check_output(target: OpenedWeights, devices: Mapping[str, str]) -> None:
    """Refuses tensors of `out=` that cannot be written to, or lie elsewhere than the result.

    Raises:
        OutputError: Names the variable.
    """
    for name in target.weights if target.devices or devices else ():
        there, expected = target.devices.get(name, "cpu"), devices.get(name, "cpu")
        if there != expected:
            raise OutputError(f"out: {name!r} is on {there}, the result on {expected}", name=name)
    for name, tensor in target.tensors.items():
        problem = target.owners[name].unwritable(tensor)
        if problem is not None:
            raise OutputError(f"out: {name!r} {problem}", name=name)


class _ArraysFor:
    """Arrays to write to in the place of the tensors of `out=`: views of them, or new arrays that are copied into them.

    Args:
        out: What should be a weight dict of arrays and tensors.
        schema: Names, shapes and dtypes of the result.
        devices: Where it lies, as far as it is not on the CPU.
        inputs: Tensors that must not be written to, as far as arrays do not share their memory.

    Raises:
        OutputError: It cannot be written to.

    Attributes:
        arrays: What to write to, by name.
    """

    def __init__(self, out: Any, schema: Schema, devices: Mapping[str, str], inputs: Sequence[Any] = ()) -> None:
        found = opened(out, "out")
        schema.check(as_weight_dict(found.weights, "out"), "out")
        _check_output(found, devices)
        _refuse_overlap_on_devices(found, inputs)
        own, seen = set(map(id, inputs)), dict[int, str]()
        copied = {n: t for n, t in found.tensors.items() if n in devices or not found.weights[n].flags.writeable}
        for name, tensor in copied.items():
            if id(tensor) in own:
                raise OutputError(f"out: {name!r} is an input as well, and inputs are never changed", name=name)
            first = seen.setdefault(id(tensor), name)
            if first != name:
                raise OutputError(f"out: {first!r} and {name!r} are one variable", name=first)
        self._out, self._copied = out, {name: (found.owners[name], tensor) for name, tensor in copied.items()}
        self._viewed = [(found.owners[n].resident, t) for n, t in found.tensors.items() if n not in copied]
        self.arrays = found.weights
        if copied:
            self.arrays = found.weights | new_arrays(Schema.of({name: found.weights[name] for name in copied}))

    def finish(self) -> WeightDict:
        """`out`, once the arrays have been written."""
        for name, (owner, tensor) in self._copied.items():
            owner.write(tensor, self.arrays[name])
        for framework, tensor in self._viewed:
            if framework is not None:
                framework.changed(tensor)
        weights: WeightDict = self._out
        return weights


class ViewOutputs(ArrayOutputs):
    """Results that are tensors, or are written to an `out=` of tensors, and to which a kernel writes as arrays.

    Args:
        schema: Names, shapes and dtypes of the result.
        place: Where tensors are to lie; None for arrays.
        out: What to write to, or None.
        columns: Arrays that must not be written to.
        inputs: Tensors that must not be.
    """

    def __init__(
        self, schema: Schema, place: Place | None, out: Any, columns: Columns | None, inputs: Sequence[Any]
    ) -> None:
        self._place = place
        self._target = None if out is None else _ArraysFor(out, schema, {} if place is None else place.devices, inputs)
        super().__init__(schema, None if self._target is None else self._target.arrays, columns)

    def finish(self) -> WeightDict:
        """The result, once the arrays have been written."""
        arrays = super().finish()
        if self._target is not None:
            return self._target.finish()
        return arrays if self._place is None else as_tensors(arrays, self._place)


class DeviceOutputs:
    """Results that are tensors, to which a kernel writes where they lie; on the CPU it writes to arrays.

    Args:
        schema: Names, shapes and dtypes of the result.
        place: Where it is to lie; of a framework that is `Resident`.
        out: A dict of tensors to write to, or None.
        columns: Arrays of the variables on the CPU, which must not be written to.
        inputs: Tensors that must not be.

    Raises:
        ContributionError: `out` has other names, shapes or dtypes (one of its children).
        OutputError: It lies elsewhere, or a tensor of it cannot be written to, or shares memory with an input or
            another.
    """

    def __init__(
        self, schema: Schema, place: Place, out: Any, columns: Columns | None, inputs: Sequence[Any] = ()
    ) -> None:
        framework = place.resident
        assert framework is not None
        self._framework, self._schema, self._out = framework, schema, out
        there, beside = (_part(schema, place.devices, there=there) for there in (True, False))
        self._targets: Tensors = {}
        rest = None
        if out is not None:
            target = opened(out, "out")
            schema.check(as_weight_dict(target.weights, "out"), "out")
            _check_output(target, place.devices)
            _refuse_overlap_on_devices(target, inputs)
            self._targets = {name: plain(target.tensors[name]) for name in there}
            rest = {name: out[name] for name in beside}
        new = {name: form for name, form in there.items() if name not in self._targets}
        self._made = {name: framework.contiguous(target) for name, target in self._targets.items()}
        self._made |= framework.empty(new, place.devices)
        own = framework.tensor_type() or ()  # inputs on the CPU may be tensors of others
        host = [tensor for tensor in inputs if not isinstance(tensor, own) or framework.device(tensor) == "cpu"]
        self._beside = ViewOutputs(beside, place.only(beside), rest, columns, host) if beside else None
        self.arrays: Mapping[str, Any] = {**self._made, **(self._beside.arrays if self._beside else {})}
        self.arrays = {name: self.arrays[name] for name in schema}

    def finish(self) -> WeightDict:
        """The result, once all of it has been written."""
        for name, target in self._targets.items():
            if self._made[name].data_ptr() != target.data_ptr():
                self._framework.write(target, self._made[name])
            self._framework.changed(target)
        made = self._made | dict(self._beside.finish() if self._beside is not None else {})
        weights: WeightDict = {name: made[name] for name in self._schema} if self._out is None else self._out
        return weights


def _refuse_overlap_on_devices(out: OpenedWeights, inputs: Sequence[Any]) -> None:
    """Refuses tensors to write to that share memory with one another or with an input, on each device but the CPU."""
    places: dict[str, dict[str, Any]] = {}
    framework: Resident | None = None
    for name, tensor in out.tensors.items():
        resident = out.owners[name].resident
        if resident is not None and resident.placement(tensor) != "cpu":
            framework = resident
            places.setdefault(resident.placement(tensor), {})[name] = tensor
    if framework is not None:
        kind = framework.tensor_type() or ()
        own = [tensor for tensor in inputs if isinstance(tensor, kind)]
        for place, there in places.items():
            _refuse_overlap_of_tensors(framework, there, (t for t in own if framework.placement(t) == place))


def _refuse_overlap_of_tensors(framework: Resident, out: Tensors, inputs: Iterable[Any]) -> None:
    """Refuses tensors to write to that share memory with one another or with an input."""
    spans = [(*framework.span(tensor), True, name) for name, tensor in out.items()]
    spans += [(*framework.span(tensor), False, "") for tensor in inputs]
    written = read = 0  # up to where the outputs and inputs reach that begin before
    last = ""
    for start, stop, is_output, name in sorted(span for span in spans if span[1] > span[0]):
        if is_output and start < written:
            raise OutputError(f"out: {last!r} and {name!r} overlap in memory", name=last)
        if start < (read if is_output else written):
            name = name if is_output else last
            raise OutputError(f"out: {name!r} overlaps an input in memory, and inputs are never changed", name=name)
        if is_output:
            written, last = stop, name
        else:
            read = max(read, stop)
