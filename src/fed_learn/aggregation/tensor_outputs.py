"""Where results go that are tensors, or that are written into tensors; see `fed_learn.aggregation.tensors`."""

from collections.abc import Iterable
from typing import Any

from fed_learn.adapters.base import Resident
from fed_learn.adapters.tensors import hold_tensors, plain
from fed_learn.aggregation.arrays import Outputs, new_arrays
from fed_learn.aggregation.tensors import Opened, Place, Tensors, as_tensors, opened
from fed_learn.errors import OutputError
from fed_learn.weights import Schema, WeightDict


def check_output(target: Opened, device: str) -> None:
    """Refuses tensors of `out=` that cannot be written to, or lie elsewhere than the result.

    Raises:
        OutputError: Names the variable.
    """
    if target.device != device:
        name = next(iter(target.weights), None)
        raise OutputError(f"out: {name!r} is on {target.device}, the result on {device}", name=name)
    for name, tensor in target.tensors.items():
        problem = target.owners[name].unwritable(tensor)
        if problem is not None:
            raise OutputError(f"out: {name!r} {problem}", name=name)


class TensorOutputs:
    """`Outputs` for results that a kernel writes to as tensors.

    Args:
        schema: Names, shapes and dtypes of the result.
        place: Where it is to lie; of a framework that is `Resident`.
        out: A dict of tensors to write to, or None.
        inputs: Tensors that must not be written to.

    Raises:
        ContributionError: `out` has other names, shapes or dtypes (one of its children).
        OutputError: It lies elsewhere, or a tensor of it cannot be written to, or shares memory with an input or
            another.
    """

    def __init__(self, schema: Schema, place: Place, out: Any, inputs: Iterable[Any] = ()) -> None:
        framework = place.framework.resident
        assert framework is not None
        self._framework = framework
        if out is None:
            self.weights = {name: framework.empty(*item, place.device) for name, item in schema.items()}
        else:
            target = opened(out, "out")
            check_output(target, place.device)
            schema.check(target.weights, "out")
            _refuse_overlap(framework, target.tensors, inputs)
            self.weights = out
        self.arrays: Tensors = {name: framework.contiguous(plain(self.weights[name])) for name in schema}

    def finish(self) -> WeightDict:
        """The result, once the tensors have been written."""
        for name, values in self.arrays.items():
            target = plain(self.weights[name])
            if values.data_ptr() != target.data_ptr():
                self._framework.write(target, values)
        return self.weights


class Target:
    """What `out=` stands for where arrays are written to: its own memory, or that of arrays to be copied into it.

    Args:
        out: What should be a weight dict of arrays and tensors.
        device: Where the result lies.
        inputs: Tensors that must not be written to, as far as arrays do not share their memory.

    Raises:
        OutputError: It cannot be written to.

    Attributes:
        arrays: What to write to; those of `out` itself, as far as it can be written to as arrays.
    """

    def __init__(self, out: Any, device: str, inputs: Iterable[Any] = ()) -> None:
        found = opened(out, "out")
        check_output(found, device)
        inputs = list(inputs)
        framework = next(iter(found.owners.values())).resident if device != "cpu" else None
        if framework is not None:
            _refuse_overlap(framework, found.tensors, inputs)
        own, seen = set(map(id, inputs)), dict[int, str]()
        copied = {n: t for n, t in found.tensors.items() if device != "cpu" or not found.weights[n].flags.writeable}
        for name, tensor in copied.items():
            if id(tensor) in own:
                raise OutputError(f"out: {name!r} is an input as well, and inputs are never changed", name=name)
            first = seen.setdefault(id(tensor), name)
            if first != name:
                raise OutputError(f"out: {first!r} and {name!r} are one variable", name=first)
        self._out, self._copied = out, {name: (found.owners[name], tensor) for name, tensor in copied.items()}
        self.arrays = found.weights
        if copied:
            self.arrays = found.weights | new_arrays(Schema.of({name: found.weights[name] for name in copied}))

    def finish(self) -> WeightDict:
        """`out`, once the arrays have been written."""
        for name, (owner, tensor) in self._copied.items():
            owner.write(tensor, self.arrays[name])
        weights: WeightDict = self._out
        return weights


class ViewOutputs(Outputs):
    """`Outputs` for results that are written to as arrays, where they or those of `out=` are tensors."""

    def __init__(self, schema: Schema, place: Place | None, out: Any) -> None:
        self._place = place
        self._target = None if out is None else Target(out, "cpu" if place is None else place.device)
        super().__init__(schema, None if self._target is None else self._target.arrays)

    def finish(self) -> WeightDict:
        """The result, once the arrays have been written."""
        arrays = super().finish()
        if self._target is not None:
            return self._target.finish()
        return arrays if self._place is None else as_tensors(arrays, self._place)


def _refuse_overlap(framework: Resident, out: Tensors, inputs: Iterable[Any]) -> None:
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


def outputs_for(schema: Schema, place: Place | None, out: Any, *, resident: str | None) -> Outputs | TensorOutputs:
    """Where the result of a stream goes.

    Args:
        schema: Names, shapes and dtypes of the result.
        place: Where tensors are to lie; None for arrays.
        out: What to write to, or None.
        resident: The kernel, if the sums are tensors.
    """
    if place is None and not hold_tensors(out):
        return Outputs(schema, out)
    if resident is None or place is None:
        return ViewOutputs(schema, place, out)
    if out is None or place.device != "cpu" or opened(out, "out").resident(resident) is not None:
        return TensorOutputs(schema, place, out)
    return ViewOutputs(schema, place, out)
