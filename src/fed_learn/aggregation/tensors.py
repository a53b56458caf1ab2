"""Tensors of a framework straight into the averages: the same kind comes out, on the same device.

Tensors on the CPU are viewed as arrays without a copy and go the way of arrays, whatever the kernel; with the torch
kernel they stay tensors. Tensors on another device stay there: the torch kernel averages them (`kernel="native"` or
`"numpy"` is an error), their float64 sums lie beside them, and what is checked of names, shapes and dtypes is checked
on placeholders. Two things go by way of copies in the memory of the host: `exact=True`, and 64-bit integers too large
for float64 sums.

The weights of one batch or stream lie on one device. Arrays count as tensors on the CPU, and mix with them freely; the
result is tensors where those of the first contribution are, in the framework of its first tensor. `like=` may be
anything that has names, shapes and dtypes; `out=` is written to in place, gradients or not, and returned.

Example:
    >>> import torch
    >>> from fed_learn import weighted_average
    >>> clients = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    >>> mean = weighted_average([model.state_dict() for model in clients], [300, 100])
    >>> clients[0].load_state_dict(mean)
    <All keys matched successfully>
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from fed_learn.adapters.base import Framework
from fed_learn.adapters.tensors import framework_of, hold_tensors
from fed_learn.aggregation.arrays import Outputs
from fed_learn.contribution import Contribution
from fed_learn.errors import NonFiniteError, OutputError, WeightsTypeError, brief
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict

Tensors: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where tensors lie, and whose they are."""

    framework: Framework
    device: str


@dataclass(frozen=True)
class Opened:
    """A weight dict as the checks take it.

    Attributes:
        weights: Arrays in the place of tensors: views of those on the CPU, placeholders of the others. What is no
            tensor is left as it is, for the checks to judge.
        tensors: The tensors.
        place: Where they lie, by the first of them; None where there are none.
    """

    weights: Any
    tensors: Tensors
    place: Place | None

    @property
    def device(self) -> str:
        """Where the weights lie."""
        return "cpu" if self.place is None else self.place.device

    @property
    def resident(self) -> bool:
        """Whether all of them are tensors."""
        return self.place is not None and len(self.tensors) == len(self.weights)

    def on_host(self) -> Any:
        """The same without placeholders: copies of tensors that are not on the CPU."""
        if self.place is None or self.place.device == "cpu":
            return self.weights
        view = self.place.framework.view
        return self.weights | {name: view(tensor) for name, tensor in self.tensors.items()}


def opened(weights: object, who: str) -> Opened:
    """Opens what should be a weight dict.

    Raises:
        WeightsTypeError: A tensor is no dense block of memory with values, or tensors lie on several devices.
        DtypeError: A tensor has a dtype that cannot be averaged.
    """
    if not isinstance(weights, Mapping):
        return Opened(weights, {}, None)
    arrays: dict[Any, Any] = {}
    tensors: Tensors = {}
    place = None
    try:
        items = list(weights.items())
    except Exception:  # noqa: BLE001 - from outside; the checks say what is wrong with it
        return Opened(weights, {}, None)
    for name, value in items:
        arrays[name] = value
        framework = None if type(value) is np.ndarray else framework_of(type(value))
        if framework is None:
            continue
        dtype = framework.check(value, who, name)
        device = framework.device(value)
        place = Place(framework, device) if place is None else place
        if device != place.device:
            _refuse_devices(f"{who}: {name!r} is", who, name, device, place.device)
        if device == "cpu":
            arrays[name] = framework.view(value, who, name)
        else:
            arrays[name] = np.broadcast_to(np.empty((), dtype), tuple(value.shape))
        tensors[name] = value
    if place is not None and place.device != "cpu" and len(tensors) < len(arrays):
        name = next(name for name in arrays if name not in tensors)
        _refuse_devices(f"{who}: {name!r} is", who, name, "cpu", place.device)
    return Opened(arrays, tensors, place)


def schema_of(weights: object, who: str) -> Schema:
    """The schema of a weight dict of arrays or tensors, wherever they lie.

    Raises:
        WeightsTypeError, DtypeError: It is none.
    """
    return Schema.of(as_weight_dict(opened(weights, who).weights, who), who)


def opened_contribution(
    contribution: Contribution, device: str | None, *, on_host: bool = False
) -> tuple[Contribution, Opened]:
    """A contribution with arrays in the place of its tensors.

    Args:
        contribution: What a client sent.
        device: Where its weights must lie; None: anywhere.
        on_host: Copy tensors that are not on the CPU, in the place of placeholders.

    Raises:
        WeightsTypeError, DtypeError: See `opened`; or they lie on another device.
    """
    who, weights = label_of(contribution.contributor), contribution.weights
    found = opened(weights, who) if hold_tensors(weights) else Opened(weights, {}, None)
    check_device(found, device, who)
    if found.place is None:
        return contribution, found
    return replace(contribution, weights=found.on_host() if on_host else found.weights), found


def check_device(found: Opened, device: str | None, who: str) -> None:
    """Refuses weights on another device.

    Raises:
        WeightsTypeError: Names the contributor.
    """
    if device is not None and found.device != device:
        name = next(iter(found.tensors), None)
        _refuse_devices(f"{who}: weights are", who, name, found.device, device)


def label_of(contributor: object) -> str:
    """What to call a contributor whose name may not even be one."""
    return contributor if isinstance(contributor, str) else brief(contributor)


def _refuse_devices(what: str, who: str, name: str | None, device: str, expected: str) -> None:
    raise WeightsTypeError(
        f"{what} on {device}, and what comes before on {expected}; weights that are averaged lie on one device",
        contributor=who,
        name=name,
        device=device,
        expected=expected,
    )


def refuse_non_finite(framework: Framework, tensors: Tensors, who: str) -> None:
    """Refuses NaN and infinity, found where the tensors are.

    Raises:
        NonFiniteError: Says which value of which variable is not finite.
    """
    for name, tensor in tensors.items():
        first = framework.first_not_finite(tensor)
        if first is not None:
            index, value = first
            raise NonFiniteError(
                f"{who}: {name!r} at index {index}: {value} is not finite",
                contributor=who,
                name=name,
                index=index,
                value=value,
            )


def scanned(found: Opened, who: str) -> tuple[Tensors, dict[str, int]]:
    """Tensors without NaN and infinity, and the largest integer of each variable.

    Raises:
        NonFiniteError: Says which value of which variable is not finite.
    """
    assert found.place is not None
    refuse_non_finite(found.place.framework, found.tensors, who)
    return found.tensors, {name: found.place.framework.magnitude(tensor) for name, tensor in found.tensors.items()}


def check_output(target: Opened, device: str) -> None:
    """Refuses tensors of `out=` that cannot be written to, or lie elsewhere than the result.

    Raises:
        OutputError: Names the variable.
    """
    if target.device != device:
        name = next(iter(target.weights), None)
        raise OutputError(f"out: {name!r} is on {target.device}, the result on {device}", name=name)
    for name, tensor in target.tensors.items():
        assert target.place is not None
        if target.place.framework.overlaps_itself(tensor):
            raise OutputError(f"out: {name!r} is expanded: its elements share memory", name=name)


class TensorOutputs:
    """`Outputs` for results that are written to as tensors.

    Args:
        schema: Names, shapes and dtypes of the result.
        place: Where it is to lie.
        out: A dict of tensors to write to, or None.
        inputs: Tensors that must not be written to.

    Raises:
        ContributionError: `out` has other names, shapes or dtypes (one of its children).
        OutputError: It lies elsewhere, or a tensor of it cannot be written to, or shares memory with an input or
            another.
    """

    def __init__(self, schema: Schema, place: Place, out: Any, inputs: Iterable[Any] = ()) -> None:
        self._framework = place.framework
        if out is None:
            self.weights = {name: place.framework.empty(*item, place.device) for name, item in schema.items()}
        else:
            target = opened(out, "out")
            check_output(target, place.device)
            schema.check(target.weights, "out")
            _refuse_overlap(place.framework, target.tensors, inputs)
            self.weights = out
        self.arrays: Tensors = {name: place.framework.contiguous(self.weights[name]) for name in schema}

    def finish(self) -> WeightDict:
        """The result, once the tensors have been written."""
        return self.write(self.arrays)

    def write(self, weights: Mapping[str, Any]) -> WeightDict:
        """The result, with the values of arrays or tensors."""
        for name, values in weights.items():
            target = self.weights[name]
            if isinstance(values, np.ndarray) or values.data_ptr() != target.data_ptr():
                self._framework.write(target, values)
        return self.weights


class ViewOutputs(Outputs):
    """`Outputs` for results that are written to as arrays, where they or those of `out=` are tensors."""

    def __init__(self, schema: Schema, place: Place | None, out: Any) -> None:
        self._place, self._out = place, out
        self._copied = place is not None and place.device != "cpu"
        target = None if out is None else opened(out, "out")
        if target is not None:
            check_output(target, "cpu" if place is None else place.device)
            schema.check(target.weights, "out")
        super().__init__(schema, None if target is None or self._copied else target.weights)

    def finish(self) -> WeightDict:
        """The result, once the arrays have been written."""
        arrays = super().finish()
        if self._place is None or (self._out is not None and not self._copied):
            return arrays if self._out is None else self._out
        if self._out is None:
            return as_tensors(arrays, self._place)
        return TensorOutputs(Schema.of(arrays), self._place, self._out).write(arrays)


def _refuse_overlap(framework: Framework, out: Tensors, inputs: Iterable[Any]) -> None:
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


def outputs_for(schema: Schema, place: Place | None, out: Any, *, resident: bool) -> Outputs | TensorOutputs:
    """Where the result of a stream goes.

    Args:
        schema: Names, shapes and dtypes of the result.
        place: Where tensors are to lie; None for arrays.
        out: What to write to, or None.
        resident: The sums are tensors.
    """
    if place is None and not hold_tensors(out):
        return Outputs(schema, out)
    if resident and place is not None and (out is None or place.device != "cpu" or opened(out, "out").resident):
        return TensorOutputs(schema, place, out)
    return ViewOutputs(schema, place, out)


def new_sums(schema: Schema, place: Place) -> Tensors:
    """float64 sums of a stream, not yet set."""
    dtype = np.dtype(np.float64)
    return {
        name: place.framework.empty((math.prod(shape),), dtype, place.device) for name, (shape, _) in schema.items()
    }


def as_arrays(sums: Mapping[str, Any]) -> dict[str, Array]:
    """Sums that lie on the CPU, as arrays."""
    frameworks = {name: framework_of(type(acc)) for name, acc in sums.items()}
    return {name: acc if (f := frameworks[name]) is None else f.view(acc) for name, acc in sums.items()}


def as_tensors(weights: WeightDict, place: Place) -> Tensors:
    """Tensors of arrays, on the CPU in the same memory."""
    return {name: place.framework.tensor(array, place.device) for name, array in weights.items()}
