"""What the parts of a job hand over to be kept (`get_state`), and how they get it back (`set_state`)."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from fed_learn.errors import StateError, described, text_of
from fed_learn.weights import listed


def kind_of(part: object) -> str:
    """What a state calls the class of a handler.

    Example:
        >>> kind_of(Counter())
        'collections.Counter'
    """
    return f"{type(part).__module__}.{type(part).__qualname__}"


def state_of(part: object) -> Any:
    """What a handler, a learner, a filter or an aggregator hands over; None: nothing.

    Raises:
        StateError: Its `get_state` raised.
    """
    get_state = getattr(part, "get_state", None)
    if get_state is None or not callable(get_state):
        return None
    try:
        return get_state()
    except Exception as error:  # whatever it raises, the state would be without it
        raise StateError(f"{kind_of(part)} could not hand over its state: {described(error)}") from error


def give_back(part: object, state: Any, where: str) -> None:
    """Gives a part its state, if there is one.

    Raises:
        StateError: It has no `set_state`, or that raised.
    """
    if state is None:
        return
    set_state = getattr(part, "set_state", None)
    if not callable(set_state):
        raise StateError(f"{where} holds a state of {kind_of(part)}, which has no set_state")
    try:
        set_state(state)
    except Exception as error:  # it may be anybody's class
        raise StateError(f"{where}: {kind_of(part)} does not take its state: {text_of(error)}") from error


def states_of(parts: Sequence[object]) -> list[list[Any]]:
    """The class of each part, and what it hands over.

    Raises:
        StateError: A `get_state` raised.
    """
    return [[kind_of(part), state_of(part)] for part in parts]


def give_all_back(parts: Sequence[object], kept: Sequence[Any], where: str) -> None:
    """Gives each part the state of the one that had the same place among those of its class. Others begin anew.

    Raises:
        StateError: A state is left over, or a part does not take its own.
    """
    waiting: dict[str, list[Any]] = defaultdict(list)
    for kind, state in kept:
        waiting[kind].append(state)
    for part in parts:
        states = waiting[kind_of(part)]
        if states:
            give_back(part, states.pop(0), where)
    missing = Counter({kind: sum([state is not None for state in states]) for kind, states in waiting.items()})
    if +missing:
        raise StateError(
            f"{where} holds the state of {listed((+missing).elements())}, which the job that goes on does not have: "
            "give it the learners, handlers and filters that it had"
        )
