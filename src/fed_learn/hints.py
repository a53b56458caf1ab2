"""What to do next, for the errors about what is no weight dict, or one of other names than expected.

Each function looks at what came and gives words to put into a message, empty where there is nothing to advise. It never
raises, whatever it looks at, and decides nothing: the checks are those of `fed_learn.weights`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from os import PathLike
from typing import ParamSpec

import numpy as np

from fed_learn.errors import a_type, as_failure, brief

P = ParamSpec("P")

WRAPPERS = {
    "module.": "torch.nn.DataParallel",
    "_orig_mod.": "torch.compile",
    "_module.": "Opacus",
    "base_model.model.": "PEFT",
}
"""What puts a name in front of the names of a model's variables, and whose doing it is."""


def _never_raising(look: Callable[P, str]) -> Callable[P, str]:
    """The function, but without words where the object from outside cannot even be looked at."""

    @wraps(look)
    def safe(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            return look(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - an object from outside may raise anything while it is looked at
            as_failure(error)
            return ""

    return safe


@_never_raising
def of_weights(weights: object) -> str:
    """What was passed in the place of a weight dict, and what to pass instead."""
    kind = a_type(type(weights))
    if callable(getattr(weights, "state_dict", None)) or hasattr(weights, "trainable_variables"):
        return f"a model ({type(weights).__name__}; pass fl.get_weights(model))"
    if isinstance(weights, list | tuple) and weights and all(hasattr(one, "shape") for one in weights):
        return f"{kind} of {len(weights)} arrays without names (pass fl.get_weights(model), or dict(zip(names, them)))"
    if hasattr(weights, "weights"):  # a JobResult, a Contribution, a ModelData
        return f"{kind} (pass its .weights)"
    if isinstance(weights, str | PathLike):
        return f"{kind} (load what it names, and pass that)"
    return kind


@_never_raising
def of_entry(name: str, value: object) -> str:
    """What to do about an entry that is no array."""
    if isinstance(value, Mapping) and value and all(hasattr(one, "shape") for one in value.values()):
        return f"; this looks like a checkpoint: pass what it holds under {name!r}"
    if hasattr(value, "shape") and not isinstance(value, np.ndarray):
        return "; get_weights() of its model gives arrays"
    if callable(getattr(value, "state_dict", None)):
        return f"; pass fl.get_weights() of what is under {name!r}"
    if isinstance(value, int | float | list):
        return "; leave it out, or make it an array by np.asarray if it is to be averaged"
    return ""


@_never_raising
def of_names(missing: Sequence[str], extra: Sequence[str]) -> str:
    """What to do about names that differ by what is in front of all of them."""
    for shorter, longer, what in ((missing, extra, "added"), (extra, missing, "missed")):
        prefix = longer[0].removesuffix(shorter[0]) if shorter and longer else ""
        if not prefix.endswith(".") or {prefix + name for name in shorter} != set(longer):
            continue
        whose = f", as {WRAPPERS[prefix]} has it" if prefix in WRAPPERS else ""
        change = f"name.removeprefix({prefix!r})" if what == "added" else f"{prefix!r} + name"
        return (
            f". All that is {what} has {brief(prefix)} in front{whose}: "
            f"{{{change}: array for name, array in weights.items()}} makes them the same"
        )
    return ""
