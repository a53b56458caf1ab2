"""A model's weights as a weight dict, and back: `get_weights`, `set_weights`, and the registry of adapters.

An adapter is found by the type of the model, in `sys.modules`: nothing is imported that the caller has not imported.
Here is what all frameworks have in common: which variables, the checks, and that a model is loaded whole or not at all.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias, TypeVar

import numpy as np

from fed_learn.adapters.base import Adapter, Variable
from fed_learn.adapters.jax import JaxModels
from fed_learn.adapters.keras import KerasModels
from fed_learn.adapters.left import warn_of_left
from fed_learn.adapters.optimizers import KerasOptimizers, TorchOptimizers
from fed_learn.adapters.tensorflow import TensorFlowModels
from fed_learn.adapters.tensors import framework_of, hold_tensors, plain
from fed_learn.adapters.torch import TorchModels
from fed_learn.adapters.trees import TreeModels
from fed_learn.errors import ModelError, NamesError, TiedVariablesError
from fed_learn.hints import of_checkpoint, of_names
from fed_learn.ties import once, under_all_names
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict, in_order_of, listed

M = TypeVar("M")
Only: TypeAlias = str | re.Pattern[str] | Callable[[str], bool]
"""Which variables: those in whose names the regular expression is found (`re.search`), or for which it is true."""

BUILT_IN: tuple[Adapter, ...] = (
    KerasModels(),
    KerasOptimizers(),
    TorchModels(),
    TorchOptimizers(),
    TensorFlowModels(),
    TreeModels(),
    JaxModels(),
)
"""In this order: a Keras model on the torch back end is also a `torch.nn.Module`, a dict of arrays a pytree of JAX."""
ADAPTERS: list[Adapter] = [*BUILT_IN]
"""Asked in this order: first those that were registered."""


def register(adapter: Adapter) -> None:
    """Makes `get_weights` and `set_weights` know one more kind of model.

    It is asked before all others, so it may also take over some models of a framework that is known already. One of its
    name that was registered before is replaced; those of the library stay, and are asked after it.

    Args:
        adapter: See `fed_learn.adapters.base.Adapter`.
    """
    ADAPTERS[:] = [adapter, *_without(adapter.name)]


def unregister(name: str) -> None:
    """Undoes `register`.

    Raises:
        KeyError: No adapter of this name was registered.
    """
    left = _without(name)
    if len(left) == len(ADAPTERS):
        raise KeyError(name)
    ADAPTERS[:] = left


def _without(name: str) -> list[Adapter]:
    return [adapter for adapter in ADAPTERS if adapter in BUILT_IN or adapter.name != name]


def adapter_of(model: object) -> Adapter:
    """The adapter of a model.

    Raises:
        ModelError: No adapter knows such a model; says which are known.
    """
    for adapter in ADAPTERS:
        if adapter.accepts(model):
            return adapter
    known = "; ".join(f"{adapter.name}: {adapter.models}" for adapter in ADAPTERS)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    instead = ""
    if isinstance(model, type):
        kind, instead = f"class {model.__module__}.{model.__qualname__}", ": pass a model that you made of it"
    elif isinstance(model, str | PathLike):
        instead = ": load the model that it names, and pass that"
    elif isinstance(model, Mapping) and model:
        instead = of_checkpoint(model) or ": a dict counts as one only if all that it holds are arrays"
    raise ModelError(f"a {kind} is no model that is known here{instead}. Known are {known}", model=kind)


def variables(model: object, only: Only | None = None) -> tuple[Variable, ...]:
    """The variables of a model, in the order of its weight dict: names, shapes, dtypes, and which can be trained.

    Args:
        model: See `get_weights`.
        only: See `get_weights`.

    Raises:
        ModelError, NamesError: See `get_weights`.

    Example:
        >>> import torch
        >>> [(v.name, v.trainable) for v in variables(torch.nn.BatchNorm1d(2))][1:3]
        [('bias', True), ('running_mean', False)]
    """
    return _sound(choose(adapter_of(model).variables(model), only))


def get_weights(model: object, *, copy: bool = True, only: Only | None = None) -> dict[str, Array]:
    """The weights of a model as a weight dict.

    - `torch.nn.Module`, also compiled or wrapped in (Distributed)DataParallel: names of `state_dict()`, without the
      prefixes of the wrappers. With `copy=False` live views, which change as the model does.
    - a torch `state_dict`: its names. With `copy=False` live views.
    - `keras.Model` or `keras.Layer`, built, or a list of `keras.Variable`: `variable.path`; metrics and random seeds
      are left out. With `copy=False` snapshots (on the torch back end live views).
    - a layer or model of Keras 2 (`tf_keras`), built: the names of its weights. With `copy=False` snapshots.
    - `tf.Module`: paths of attributes; a list of `tf.Variable`: index and name. With `copy=False` snapshots.
    - a JAX pytree (Flax, Equinox, optax, dicts): key paths. With `copy=False` its arrays, which never change.
    - the state of a `torch.optim.Optimizer` or a `keras.optimizers.Optimizer`, without its hyperparameters:
      `state.0.exp_avg`, `variable.path`. As of a model of the framework.
    - a dict of numpy arrays, also nested, as `flax.serialization` gives it: the same key paths, without JAX too.

    Tensors of torch on another device than the CPU stay there, as tensors that `weighted_average` and `Accumulator`
    take; those of TensorFlow and JAX are copied to the host. With `copy=False` they are the model's own memory, and can
    be written to: torch has no read-only tensors.

    With `copy=False`, all names of one variable (tied weights, one array in two places of a JAX pytree) hold the very
    same array. That is how a learner tells `FederatedClient` what is tied, so that noise meets it once: see
    `fed_learn.ties`. A copy has an array for each name, so that a change in place of all arrays changes each once.

    Args:
        model: What to read.
        copy: The caller may keep and change the arrays: they are its own. Else nothing is copied where the framework
            allows that, and the arrays are read-only (tensors on a device are not).
        only: Which variables: a regular expression (`re.search`) or a predicate on names, for parts such as LoRA's. A
            `UserWarning` names variables that are trained and left out, where the model also has frozen parameters.

    Returns:
        A new dict, in the model's order, which does not depend on anything but its architecture; an empty one of a
        model that never has variables, such as `torch.nn.ReLU()`.

    Raises:
        ModelError: No adapter knows the model, or variables are still to be made, as it sees its first batch.
        NamesError: `only` fits none of the names, or is no regular expression.
        DtypeError, WeightsTypeError: A variable has a dtype that cannot be averaged, or no values.

    Warns:
        UserWarning: The model keeps state that cannot travel as numbers, such as a vocabulary; once for each model.

    Example:
        >>> import torch
        >>> {name: array.shape for name, array in get_weights(torch.nn.Linear(3, 2)).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    adapter = adapter_of(model)
    views, trained = getattr(adapter, "views", None), getattr(adapter, "trained", None)
    if trained is not None and isinstance(only, str | re.Pattern):  # a function may have chosen with care
        _tell_of_trained(trained(model), only)
    plain: dict[str, Array] | None = views(model, predicate(only)) if views is not None else None
    if plain:
        return {name: np.array(view) for name, view in plain.items()} if copy else plain
    left = getattr(adapter, "left", None)
    if left is not None:
        warn_of_left(model, left(model, predicate(only)))
    chosen = {variable.name: variable for variable in _sound(choose(adapter.variables(model), only))}
    tied = {} if copy else tied_names(chosen.values())
    found = {name: adapter.get(variable, copy=copy) for name, variable in once(chosen, tied).items()}
    return under_all_names(found, tied, chosen)


def tied_names(chosen: Collection[Variable]) -> dict[str, str]:
    """The further names of variables → the first. Two places of a pytree that hold one array are tied as well.

    Loading unties these two, which is why they are variables of their own and have no identity in common.

    Example:
        >>> table = np.ones(2)
        >>> tied_names(variables({"embedding": table, "head": table}))
        {'head': 'embedding'}
    """
    first: dict[object, str] = {}
    by_place = {v.name: v.identity == v.name and hasattr(v.tensor, "shape") for v in chosen}
    named = {v.name: first.setdefault(id(v.tensor) if by_place[v.name] else v.identity, v.name) for v in chosen}
    return {name: one for name, one in named.items() if name != one}


def set_weights(model: M, weights: WeightDict, *, strict: bool = True, only: Only | None = None) -> M:
    """Loads a weight dict into a model: all of it, or nothing if anything is wrong with it.

    Of the names of a tied variable one is enough, as in a file of safetensors or of `save_pretrained`, which leave out
    the others. Values are copied in place: optimizers keep their hold on the variables, and what is frozen stays
    frozen. A JAX pytree cannot be changed; a new one is returned, an `nnx.Module` as well, and for a dict of numpy
    arrays a new dict. It shares with the old one what was not loaded.

    Args:
        model: What to load into; see `get_weights`.
        weights: Arrays, or tensors of any framework, with just the names, shapes and dtypes of the model; or a list of
            one for each variable, in the model's order, as `keras.Model.get_weights()` gives.
        strict: All variables of the model must be there (all that `only` chooses). Else some may be missing, and stay
            as they are; a name that the model does not have is refused all the same.
        only: Which variables are meant; see `get_weights`.

    Returns:
        The model; for a JAX pytree the new one.

    Raises:
        NamesError, ShapeError, DtypeError, WeightsTypeError: The weights do not fit; names the variable.
        TiedVariablesError: Two names of one variable, or variables that share memory, have different values.
        ModelError: See `get_weights`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> set_weights(model, {"weight": np.float32([[2]]), "bias": np.float32([1])})(torch.ones(1)).item()
        3.0
    """
    adapter = adapter_of(model)
    if isinstance(model, Mapping) and not isinstance(weights, Mapping) and any(a.accepts(weights) for a in ADAPTERS):
        raise ModelError("set_weights takes the model first, then the weights: these are the other way round")
    known = {variable.name: variable for variable in choose(adapter.variables(model), only)}
    values, arrays = _opened(in_order_of(weights, known, "weights", "the model"))
    held = {known[name].identity: name for name in arrays if name in known}
    for name in [name for name, v in known.items() if name not in arrays and v.identity in held]:
        values[name], arrays[name] = (given[held[known[name].identity]] for given in (values, arrays))
    meant = _sound(v for name, v in known.items() if strict or name in arrays)
    shapes = {v.name: arrays[v.name].shape if v.grows and v.name in arrays else v.shape for v in meant}
    expected = Schema((v.name, (shapes[v.name], v.dtype)) for v in meant)
    try:
        expected.check(arrays, "weights")
    except NamesError as error:
        raise _hinted(error, adapter, known, arrays) from None
    _refuse_untied([known[name] for name in arrays], values)
    loaded: M = adapter.load(model, {name: (known[name], _for(adapter, values[name], name)) for name in arrays})
    return loaded


def _hinted(error: NamesError, adapter: Adapter, known: Iterable[str], given: Iterable[str]) -> NamesError:
    """The same error, with what the adapter has to say of it: of all names, also where some may be missing.

    That stands in the place of what is said of such names without a model.
    """
    hint = getattr(adapter, "hint", None)
    known, given = dict.fromkeys(known), dict.fromkeys(given)
    missing, extra = [n for n in known if n not in given], [n for n in given if n not in known]
    said = hint(missing, extra) if hint is not None else ""
    general = of_names(missing, extra)
    message = f"{str(error).removesuffix(general)}{f'. {said}' if said else general}"
    return NamesError(message, contributor=error.contributor, name=error.name, missing=error.missing, extra=error.extra)


def _for(adapter: Adapter, value: Any, name: str) -> Any:
    """The value as it is, but tensors of another framework than the model's as arrays."""
    framework = framework_of(type(value))
    if framework is None or framework.name == adapter.name:
        return value
    return framework.view(value, "weights", name)


def predicate(only: Only | None) -> Callable[[str], object] | None:
    """What tells of a name whether `only` means it; None: all are meant.

    Raises:
        NamesError: It is no regular expression.
    """
    if only is None or callable(only):
        return only
    try:
        return re.compile(only).search
    except re.error as error:
        raise NamesError(f"only={only!r} is no regular expression: {error}") from error


def choose(found: Sequence[Variable], only: Only | None) -> tuple[Variable, ...]:
    """Those of the variables that `only` means, as `get_weights` takes it.

    Raises:
        NamesError: It fits none of the names, or is no regular expression.
    """
    fits = predicate(only)
    if fits is None:
        return tuple(found)
    chosen = tuple(variable for variable in found if fits(variable.name))
    if not chosen:
        some = ", ".join(repr(variable.name) for variable in found[:3])
        raise NamesError(f"only={only!r} fits none of the model's {len(found)} variables ({some} …)")
    return chosen


def _tell_of_trained(trained: Mapping[str, bool], only: Only) -> None:
    """Warns of what training changes and `only` leaves out, if a part is frozen, as of a model with adapters."""
    fits = predicate(only)
    changed = [name for name in trained if trained[name]]
    left = [name for name in changed if fits is not None and not fits(name)]
    if left and len(left) < len(changed) < len(trained):
        warnings.warn(
            f"only={only!r} leaves out what this model trains as well: {listed(left)}. Each client keeps its own; take "
            "them in, or freeze them",
            stacklevel=3,
        )


def _sound(chosen: Iterable[Variable]) -> tuple[Variable, ...]:
    """The same variables, if nothing is wrong with any of them."""
    chosen = tuple(chosen)
    for variable in chosen:
        if variable.problem is not None:
            raise variable.problem
    return chosen


def _opened(weights: object) -> tuple[dict[str, Any], dict[str, Array]]:
    """The values to load, and for the checks an array or placeholder of each."""
    if not isinstance(weights, Mapping) or not hold_tensors(weights):
        arrays = as_weight_dict(weights, "weights")
        return arrays, arrays
    values: dict[Any, Any] = {name: plain(value) for name, value in weights.items()}
    shown = dict(values)
    for name, value in values.items():
        framework = framework_of(type(value))
        if framework is not None:
            dtype = framework.check(value, "weights", name)
            shown[name] = np.broadcast_to(np.empty((), dtype), tuple(value.shape))
    arrays = as_weight_dict(shown, "weights")
    tensors = {name for name, value in values.items() if shown[name] is not value}
    return {name: values[name] if name in tensors else array for name, array in arrays.items()}, arrays


def _refuse_untied(loaded: list[Variable], values: Mapping[str, Any]) -> None:
    seen: dict[object, str] = {}
    for variable in loaded:
        first = seen.setdefault(variable.identity, variable.name)
        if values[first] is values[variable.name]:
            continue
        one, other = (_bytes(values[name], name) for name in (first, variable.name))
        if one != other:
            raise TiedVariablesError(
                f"weights: {first!r} and {variable.name!r} are one variable in the model, and differ: give one of them "
                "alone, and where a client's filters made them differ, let its learner return "
                "fl.get_weights(model, copy=False), which has one array for both",
                name=variable.name,
                names=(first, variable.name),
            )


def _bytes(value: Any, name: str) -> bytes:
    framework = framework_of(type(value))
    array: Array = np.ascontiguousarray(value if framework is None else framework.view(value, "weights", name))
    return array.astype(array.dtype.newbyteorder("="), copy=False).tobytes()
