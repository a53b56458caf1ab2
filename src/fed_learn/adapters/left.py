"""State that a model keeps beside its variables, and that cannot travel as numbers: it is named once by a warning.

Which state that is, each adapter says (`Adapter.left`).
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

_told: dict[int, "weakref.ref[Any]"] = {}
"""The models that have been told of, by `id`, since not each of them has a hash."""


def warn_of_left(model: Any, states: Sequence[str]) -> None:
    """Warns, once for each model, of state that its weights do not have.

    Args:
        model: The model.
        states: What it is and where, in words: `"the vocabulary of StringLookup 'lookup'"`.

    Warns:
        UserWarning: Names each of the states and says what to do.

    Example:
        >>> class Model: ...
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn_of_left(Model(), ["the vocabulary of StringLookup 'lookup'"])
        >>> str(caught[0].message)[:79]
        "the model keeps the vocabulary of StringLookup 'lookup', which cannot travel as"
    """
    if not states or id(model) in _told:
        return
    key = id(model)
    _told[key] = weakref.ref(model, lambda _: _told.pop(key, None))
    warnings.warn(
        f"the model keeps {', '.join(states)}, which cannot travel as numbers: its weights leave it out, and loading "
        "them does not change it. Give every client the same, from one file or in the code that makes the model",
        stacklevel=3,
    )
