"""What a server and a client refuse."""

import math
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, Recorder, clients_of, initial_weights, server_of, two_clients

import fed_learn as fl
from fed_learn.contribution import FINAL_MODEL, GLOBAL_BEST


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "a"], [FINAL_MODEL], ["a", GLOBAL_BEST], []], ids=str)
def test_names_that_are_used_twice_or_reserved_are_refused_before_anything_starts(names: list[str]) -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"two clients|names a global model|at least one client"):
        server_of(handlers=[recorder]).run(
            [fl.FederatedClient(name, AddingLearner(), handlers=[recorder]) for name in names]
        )
    assert recorder.events == []


def test_a_pool_without_workers_is_refused_before_anything_starts() -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="max_workers"):
        server_of(handlers=[recorder]).run(clients_of({"a": AddingLearner()}, handlers=[recorder]), max_workers=0)
    assert recorder.events == []


def test_a_minimum_that_the_clients_can_never_reach_is_an_error_before_the_first_round() -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="min_contributions is 3, but there are 2 clients"):
        server_of(handlers=[recorder], min_contributions=3).run(two_clients())
    assert recorder.events == []


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_client_needs_a_name(name: Any) -> None:
    with pytest.raises(ValueError, match="name"):
        fl.FederatedClient(name, AddingLearner())


class HalfAHandler:
    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        pass


every_non_handler = pytest.mark.parametrize(
    "thing",
    [object(), fl.Handler, print, None, HalfAHandler()],
    ids=["object", "class", "function", "None", "half a handler"],
)


@every_non_handler
def test_what_is_no_handler_is_refused_by_a_server(thing: Any) -> None:
    with pytest.raises(TypeError, match="is no handler"):
        server_of(handlers=[fl.Handler(), thing])


@every_non_handler
def test_what_is_no_handler_is_refused_by_a_client(thing: Any) -> None:
    with pytest.raises(TypeError, match="is no handler"):
        fl.FederatedClient("a", AddingLearner(), handlers=[fl.Handler(), thing])


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_rounds": 0},
        {"num_rounds": -1},
        {"min_contributions": 0},
        {"on_bad_contribution": "ignore"},
        {"on_handler_error": "ignore"},
        {"kind": "gradient"},
        {"kernel": "abacus"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        fl.FederatedServer(initial_weights(), **{"num_rounds": 1, **arguments})


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (None, fl.WeightsTypeError),
        ({"w": [1.0]}, fl.WeightsTypeError),
        ({"w": np.array([math.nan])}, fl.NonFiniteError),
        ({"w": np.array(["a"])}, fl.DtypeError),
        ({"w": np.array(["a"], np.dtypes.StringDType())}, fl.DtypeError),
        ({"w": np.zeros(1, complex)}, fl.DtypeError),
    ],
    ids=["None", "list", "NaN", "str", "StringDType", "complex"],
)
def test_initial_weights_that_cannot_be_averaged_are_refused(weights: Any, error: type[fl.FedLearnError]) -> None:
    with pytest.raises(error, match="global model"):
        fl.FederatedServer(weights, num_rounds=1)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "uint64"])
def test_a_model_whose_differences_its_dtypes_cannot_hold_is_refused_for_differences_alone(dtype: str) -> None:
    weights = {"w": np.zeros(2), "mask": np.zeros(2, dtype)}
    with pytest.raises(fl.DtypeError, match=r"global model: 'mask'.*cannot hold a difference") as caught:
        fl.FederatedServer(weights, num_rounds=1, kind=fl.Kind.DIFF)
    assert (caught.value.name, caught.value.dtype) == ("mask", np.dtype(dtype))
    assert fl.FederatedServer(weights, num_rounds=1).weights["mask"].dtype == np.dtype(dtype)


@pytest.mark.parametrize("count", [2.5, 2.0, True, "3", math.nan], ids=repr)
@pytest.mark.parametrize("argument", ["num_rounds", "min_contributions"])
def test_a_count_that_is_no_int_is_refused(argument: str, count: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be an int, not {count!r}"):
        fl.FederatedServer(initial_weights(), **{"num_rounds": 1, argument: count})


@pytest.mark.parametrize("mode", ["maximize", "MAX", ""], ids=repr)
def test_a_learner_whose_mode_is_unknown_is_refused_by_its_client(mode: Any) -> None:
    class Moody(AddingLearner):
        pass

    Moody.mode = mode
    with pytest.raises(ValueError, match=f"mode must be 'max' or 'min', not {mode!r}"):
        fl.FederatedClient("a", Moody())
