"""Loads the global weights into a client's or an evaluator's model, and reads a contribution from it.

The global weights decide which variables take part. Those that the model has beside them stay local.
"""

import logging
from collections.abc import Collection
from typing import Any

import numpy as np

from fed_learn.adapters import describe, get_weights, set_weights
from fed_learn.adapters.describe import DescribedVariable
from fed_learn.adapters.layout import LayoutMap
from fed_learn.adapters.tensors import framework_of
from fed_learn.errors import ModelError, TiedVariablesError
from fed_learn.model_meta import FLContext
from fed_learn.ties import once, twins, under_all_names
from fed_learn.weights import Array, WeightDict

logger = logging.getLogger(__name__)

LARGEST_RANDOM_STATE = 8192
"""Bytes; that of torch's generator has 5056."""


def weights_in(ctx: FLContext) -> WeightDict:
    """The weights of the context's model.

    Raises:
        ModelError: The context holds no model.
    """
    if ctx.model is None or ctx.model.weights is None:
        raise ModelError("the context holds no model to evaluate")
    return ctx.model.weights


def load(model: Any, weights: WeightDict, layout: LayoutMap | None) -> None:
    """Loads global weights into a model, in place; variables that the global model lacks stay as they are.

    Args:
        model: The model.
        weights: The global weights.
        layout: The map from the global weights to the model's; None where both have the same names and shapes.

    Raises:
        NamesError, ShapeError, DtypeError, WeightsTypeError: The weights do not fit.
    """
    if layout is not None:
        weights = _mapped(model, weights, layout)
    try:
        set_weights(model, weights, strict=False)
    except TiedVariablesError as error:
        # One client that sends two values for it would otherwise stop the training of all others.
        logger.warning("the global model has two values for one variable, of which the first is loaded: %s", error)
        tied = twins(get_weights(model, copy=False))
        set_weights(model, {n: v for n, v in weights.items() if tied.get(n) not in weights}, strict=False)


def _mapped(model: Any, weights: WeightDict, layout: LayoutMap) -> dict[str, Array]:
    """The weights in names and layouts of the model, which supplies those that the global model lacks."""
    lacking = _lacking(weights, layout)
    if all(name in layout.left_out for name in lacking):
        return layout(weights)
    local = get_weights(model, copy=False, only=layout.target.__contains__)
    return layout({**layout.inverse(local, base=lacking | dict(weights)), **weights}, base=local)


def _lacking(weights: WeightDict, layout: LayoutMap) -> dict[str, Array]:
    """Zeros for what the map takes and the global model lacks."""
    return {name: np.zeros(*form) for name, form in layout.source.items() if name not in weights}


def read(model: Any, weights: WeightDict, layout: LayoutMap | None) -> dict[str, Array]:
    """The model's weights as a contribution: new arrays under the names of the global weights.

    All names of one variable hold one array, so that whatever a client does to it is done once: see `fed_learn.ties`.

    Args:
        model: The model.
        weights: The global weights from which it started.
        layout: See `load`.
    """
    if layout is None:
        found = get_weights(model, copy=False, only=weights.__contains__)
        tied = twins(found)
        return under_all_names({name: _copied(value) for name, value in once(found, tied).items()}, tied, weights)
    # The base supplies what the model lacks; what the global weights lack as well is needed only for its shape.
    local = get_weights(model, copy=False, only=layout.target.__contains__)
    returned = layout.inverse(local, base=_lacking(weights, layout) | dict(weights))
    return under_all_names(returned, layout.tied, weights)


def own_variables(model: Any, names: Collection[str], layout: LayoutMap | None) -> dict[str, Array]:
    """The variables of a model that change, and that no global model with these names gives it.

    They outlive a round here alone: statistics, counters, random states, and what is trained and not sent. Frozen
    variables, masks and packed codes are not among them.

    Args:
        model: The model.
        names: Names of the variables of the global model.
        layout: See `load`.
    """
    given = set(names)
    if layout is not None:
        whole = all(name in layout.left_out for name in layout.source if name not in names)
        given = set(layout.target) - set(layout.from_base) if whole else set()
    own = {one.name for one in describe(model) if one.name not in given and _changes(one)}
    found = get_weights(model, copy=False, only=own.__contains__) if own else {}
    return {name: _copied(value) for name, value in found.items()}


def _changes(variable: DescribedVariable) -> bool:
    if variable.problem is not None:
        return False
    if variable.role == "code":  # random states are small; packed weights are not, and stay as they are
        return variable.nbytes <= LARGEST_RANDOM_STATE
    return variable.role in ("statistic", "counter") or variable.trainable is True


def _copied(value: Any) -> Array:
    """A copy of the value, which is a tensor where the model is on a device, as an array."""
    framework = framework_of(type(value))
    array: Array = np.array(value) if framework is None else framework.view(value)
    return array
