"""The contract of all adapters, for models of every framework: what is read, what is loaded, and what is refused."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import models_of_frameworks as models
import numpy as np
import pytest

import fed_learn as fl
from fed_learn import adapters
from fed_learn.adapters.base import Variable

Weights = dict[str, Any]
every_case = pytest.mark.parametrize("case", list(models.parameters()))


def bits(weights: Any) -> Any:
    return {n: (a.dtype.str, a.dtype.name, a.shape, np.ascontiguousarray(a).tobytes()) for n, a in weights.items()}


def aligned(array: Any) -> Any:
    """A copy where frameworks like to share memory: at a multiple of 64."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("name", models.FRAMEWORKS)
def test_the_frameworks_are_installed(name: str) -> None:
    # Otherwise the tests of its models are skipped, and this one says so.
    importlib.import_module(name)


# Reading.


@every_case
def test_names_and_their_order_depend_on_the_architecture_alone(case: models.Case) -> None:
    model = case.make(1)
    assert list(fl.get_weights(model)) == case.names.split()
    assert list(fl.get_weights(case.train(model))) == case.names.split()


@every_case
def test_values_shapes_and_dtypes_are_those_that_the_framework_tells(case: models.Case) -> None:
    model = case.make(1)
    expected = bits(case.read(model))
    assert {name: type(array) for name, array in fl.get_weights(model).items()} == dict.fromkeys(expected, np.ndarray)
    assert bits(fl.get_weights(model)) == bits(fl.get_weights(model, copy=False)) == expected
    told = {v.name: (v.dtype.str, v.dtype.name, v.shape) for v in adapters.variables(model)}
    assert told == {name: one[:3] for name, one in expected.items()}
    assert bits(case.read(model)) == expected  # reading changes nothing


@every_case
def test_roles_and_what_is_trained_are_told(case: models.Case) -> None:
    found = adapters.variables(case.make(1))
    assert "".join({True: "y", False: "n", None: "."}[v.trainable] for v in found) == case.trainable
    assert "".join(models.LETTERS[v.role] for v in found) == case.roles


@every_case
def test_a_copy_belongs_to_the_caller_and_is_not_changed_by_training(case: models.Case) -> None:
    model = case.make(1)
    weights = fl.get_weights(model)
    before = bits(weights)
    trained = case.train(model)
    assert bits(weights) == before != bits(case.read(trained))
    after = bits(case.read(trained))
    for array in weights.values():
        assert array.flags.writeable
        array[...] = 0
    assert bits(case.read(trained)) == after


@every_case
def test_without_a_copy_the_arrays_are_read_only_and_cost_no_memory(case: models.Case) -> None:
    model = case.make(1)
    weights, again = (fl.get_weights(model, copy=False) for _ in range(2))
    for name, array in weights.items():
        assert not array.ndim or np.shares_memory(array, again[name]), name
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    before = bits(weights)
    trained = case.train(model)
    assert (bits(weights) == before) is not case.live
    assert bits(fl.get_weights(trained)) == bits(case.read(trained)) != before


@every_case
def test_a_loaded_snapshot_without_copy_is_not_changed_either(case: models.Case) -> None:
    model, other = case.make(1), fl.get_weights(case.make(2))
    weights = fl.get_weights(model, copy=False)
    before = bits(weights)
    fl.set_weights(model, other)
    assert (bits(weights) == before) is not case.live


# Loading.


@every_case
def test_a_round_trip_is_equal_to_the_bit_and_changes_no_input(case: models.Case) -> None:
    source, target = case.make(1), case.make(2)
    weights = fl.get_weights(source, copy=False)
    expected, other = bits(case.read(source)), bits(case.read(target))
    assert expected != other
    loaded = fl.set_weights(target, weights)
    assert bits(case.read(loaded)) == bits(fl.get_weights(loaded)) == expected == bits(case.read(source))
    assert bits(weights) == expected
    assert type(loaded) is type(target)
    assert (loaded is target) is case.in_place
    assert bits(case.read(target)) == (expected if case.in_place else other)


@every_case
def test_a_loaded_model_keeps_nothing_of_the_arrays(case: models.Case) -> None:
    weights = {name: aligned(array) for name, array in fl.get_weights(case.make(1)).items()}
    expected = bits(weights)
    model = fl.set_weights(case.make(2), weights)
    for array in weights.values():
        array[...] = 0
    assert bits(case.read(model)) == expected
    # Nor does training write into them.
    for array in weights.values():
        array.flags.writeable = False
    unchanged = bits(weights)
    case.train(model)
    assert bits(weights) == unchanged


@every_case
def test_a_loaded_model_trains_on(case: models.Case) -> None:
    weights = fl.get_weights(case.make(1))
    trained = case.train(fl.set_weights(case.train(case.make(2)), weights))
    after = case.read(trained)
    assert bits(after) != bits(weights)
    assert all(np.isfinite(array).all() for array in after.values())
    assert [v.trainable for v in adapters.variables(trained)] == [v.trainable for v in adapters.variables(case.make(1))]


@every_case
def test_strides_and_byte_order_of_what_is_loaded_do_not_matter(case: models.Case) -> None:
    weights = fl.get_weights(case.make(1))
    for odd in (
        {name: array.astype(array.dtype.newbyteorder()) for name, array in weights.items()},
        {name: np.array(array, order="F") for name, array in weights.items()},
        {name: np.flip(np.flip(array).copy()) for name, array in weights.items()},
        {name: np.repeat(array[..., None], 2, -1)[..., 0] for name, array in weights.items()},
        fl.get_weights(case.make(1), copy=False),
    ):
        assert bits(case.read(fl.set_weights(case.make(2), odd))) == bits(weights)


@every_case
@pytest.mark.parametrize("framework", adapters.FRAMEWORKS, ids=lambda framework: framework.name)
def test_tensors_of_any_framework_are_loaded_and_not_kept(case: models.Case, framework: adapters.Framework) -> None:
    pytest.importorskip(framework.name)
    arrays = {name: aligned(array) for name, array in fl.get_weights(case.make(1)).items()}
    expected, last = bits(arrays), case.names.split()[-1]
    tensors: Any = {name: framework.tensor(array) for name, array in arrays.items()}
    model = fl.set_weights(case.make(2), tensors)
    with pytest.raises(fl.ShapeError, match=last):
        fl.set_weights(model, {**tensors, last: framework.tensor(np.zeros((1, 2, 3, 4), arrays[last].dtype))})
    for array in arrays.values():  # which some tensors share
        array[...] = 0
    assert bits(case.read(model)) == expected


def wrongs(weights: Weights, last: str) -> Iterator[tuple[Any, type[Exception]]]:
    array = weights[last]
    yield weights | {last: np.zeros((*array.shape, 2), array.dtype)}, fl.ShapeError
    yield weights | {last: np.zeros((1, *array.shape), array.dtype)}, fl.ShapeError
    yield weights | {last: array.astype(np.complex64)}, fl.DtypeError
    yield weights | {last: array.astype(np.float64)}, fl.DtypeError
    yield weights | {last: array.tolist()}, fl.WeightsTypeError
    yield weights | {last: None}, fl.WeightsTypeError
    # One name of a tied variable is enough: without any of them it is missing.
    yield {name: other for name, other in weights.items() if not np.array_equal(other, array)}, fl.NamesError
    yield weights | {last + "_": array}, fl.NamesError
    yield list(weights.values())[:-1], fl.NamesError
    yield [*weights.values(), None], fl.WeightsTypeError


@every_case
def test_anything_wrong_with_the_last_variable_leaves_all_others_as_they_were(case: models.Case) -> None:
    model, weights = case.make(2), fl.get_weights(case.make(1))
    before, last = bits(case.read(model)), case.names.split()[-1]
    for wrong, error in wrongs(weights, last):
        with pytest.raises(error) as caught:
            fl.set_weights(model, wrong)
        assert last in str(caught.value) or isinstance(wrong, list)
        assert bits(case.read(model)) == before


@pytest.mark.filterwarnings("ignore:only=:UserWarning")  # a part of these models is frozen, and more is trained
@every_case
def test_only_chooses_by_expression_or_predicate_and_a_part_is_loaded_back(case: models.Case) -> None:
    source, target = case.make(1), case.make(2)
    names = case.names.split()
    part = names[2:4]
    expression = "|".join(f"^{re.escape(name)}$" for name in part)
    weights = fl.get_weights(source, only=expression)
    assert list(weights) == part
    assert bits(weights) == bits(fl.get_weights(source, only=lambda name: name in part))
    before, new = case.read(target), case.read(source)
    expected = bits({name: (new if name in part else before)[name] for name in names})
    for how in ({"only": expression}, {"only": part.__contains__}, {"strict": False}):
        loaded = fl.set_weights(case.make(2), weights, **how)
        assert bits(case.read(loaded)) == expected
    with pytest.raises(fl.NamesError, match="misses"):
        fl.set_weights(target, weights)
    with pytest.raises(fl.NamesError, match="adds"):
        fl.set_weights(target, fl.get_weights(source), only=expression)
    with pytest.raises(fl.NamesError, match="adds"):
        fl.set_weights(target, weights | {"nobody": weights[part[0]]}, strict=False)
    with pytest.raises(fl.NamesError, match="fits none"):
        fl.get_weights(target, only="^nobody$")
    assert bits(case.read(target)) == bits(before)


@every_case
def test_the_average_of_two_models_is_loaded(case: models.Case) -> None:
    one, other = case.make(1), case.make(2)
    copies = [fl.get_weights(model) for model in (one, other)]
    expected = fl.weighted_average(copies, [1, 3])
    mean = fl.weighted_average([fl.get_weights(model, copy=False) for model in (one, other)], [1, 3])
    assert bits(mean) == bits(expected)
    loaded = fl.set_weights(case.make(3), mean)
    assert bits(case.read(loaded)) == bits(expected)


# Finding the adapter.


@pytest.mark.parametrize("thing", [None, 3, "model", object(), {}, [], {"w": object()}, [np.zeros(2)], {1: 2, "a": 3}])
def test_what_nobody_knows_is_refused_and_the_known_frameworks_are_named(thing: Any) -> None:
    for use in (fl.get_weights, lambda model: fl.set_weights(model, {})):
        with pytest.raises(fl.ModelError, match=r"no model that is known here.*keras.*torch.*tensorflow.*jax"):
            use(thing)


class Mine:
    def __init__(self) -> None:
        self.weights: Weights = {"a": np.zeros(2), "b": np.ones(3, np.float32)}


class MyAdapter:
    name = "mine"
    models = "Mine"

    def accepts(self, model: object) -> bool:
        return isinstance(model, Mine)

    def variables(self, model: Mine) -> list[Variable]:
        return [Variable(n, a.shape, a.dtype, a, True, None, id(a)) for n, a in model.weights.items()]

    def get(self, variable: Variable, *, copy: bool) -> Any:
        return np.array(variable.tensor) if copy else variable.tensor

    def load(self, model: Mine, values: Any) -> Mine:
        for variable, value in values.values():
            np.copyto(variable.tensor, value)
        return model

    def hint(self, missing: Sequence[str], extra: Sequence[str]) -> str:
        return f"Mine knows {len(missing)} and {len(extra)}"


def test_a_third_party_registers_an_adapter_and_takes_it_back() -> None:
    with pytest.raises(fl.ModelError):
        fl.get_weights(Mine())
    known = list(adapters.ADAPTERS)
    for _ in range(2):  # the second replaces the first
        adapters.register(MyAdapter())
    try:
        assert adapters.ADAPTERS[1:] == known
        model = Mine()
        weights = fl.get_weights(model)
        assert bits(weights) == bits(model.weights)
        assert fl.set_weights(model, weights | {"a": np.full(2, 7.0)}) is model
        assert model.weights["a"].tolist() == [7, 7]
        with pytest.raises(fl.ShapeError, match="'b'"):
            fl.set_weights(model, {"a": np.zeros(2), "b": np.zeros(2, np.float32)})
        assert model.weights["a"].tolist() == [7, 7]
        with pytest.raises(fl.NamesError, match=r"misses 'b'.*Mine knows 1 and 0"):
            fl.set_weights(model, {"a": np.zeros(2)})
    finally:
        adapters.unregister("mine")
    assert known == adapters.ADAPTERS
    with pytest.raises(fl.ModelError):
        fl.get_weights(Mine())
    with pytest.raises(KeyError):
        adapters.unregister("mine")


class Nobody(MyAdapter):
    """Has the name of one of the library's adapters, as those must whose models hold tensors of torch."""

    name = "torch"


def test_an_adapter_with_the_name_of_a_built_in_one_leaves_that_in_its_place() -> None:
    torch = pytest.importorskip("torch")
    known, model = list(adapters.ADAPTERS), torch.nn.Linear(2, 1)
    adapters.register(Nobody())
    try:
        assert adapters.ADAPTERS[1:] == known
        assert list(fl.get_weights(model)) == ["weight", "bias"]
        assert list(fl.get_weights(Mine())) == ["a", "b"]
    finally:
        adapters.unregister("torch")
    assert known == adapters.ADAPTERS
    with pytest.raises(KeyError):
        adapters.unregister("torch")
    assert list(fl.get_weights(model)) == ["weight", "bias"]


@every_case
def test_what_is_no_regular_expression_is_refused(case: models.Case) -> None:
    model = case.make(1)
    for use in (fl.get_weights, adapters.variables, lambda model, only: fl.set_weights(model, {}, only=only)):
        with pytest.raises(fl.NamesError, match=r"only='\(' is no regular expression: missing \)"):
            use(model, only="(")


def test_a_model_that_never_has_variables_has_an_empty_weight_dict() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.ReLU()
    assert fl.get_weights(model) == fl.get_weights(model, copy=False) == {}
    assert fl.set_weights(model, {}) is model
    with pytest.raises(fl.NamesError, match="fits none of the model's 0 variables"):
        fl.get_weights(model, only="weight")


# Nothing is imported that the caller has not imported.

LOADED = "sorted({name.split('.')[0] for name in sys.modules} & set(frameworks))"


@pytest.mark.parametrize(
    ("imports", "model"),
    [
        ("torch", "torch.nn.Linear(2, 3)"),
        ("jax.numpy", "{'w': jax.numpy.ones((2, 3))}"),
        ("equinox, jax", "equinox.nn.Linear(2, 3, key=jax.random.key(0))"),
        ("keras", "keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])"),
        ("tensorflow", "[tensorflow.Variable([1.0])]"),
    ],
)
def test_an_adapter_imports_no_framework(imports: str, model: str) -> None:
    for name in imports.split(", "):
        pytest.importorskip(name.split(".")[0])
    # Some frameworks import others: what counts is what is added to that.
    code = f"""
import sys
frameworks = {models.FRAMEWORKS}
import {imports}
before = {LOADED}
model = {model}
import fed_learn as fl
fl.set_weights(model, fl.get_weights(model))
try:
    fl.get_weights(object())
except fl.ModelError:
    print(before, {LOADED})
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = printed.strip().split("] [")
    assert before.strip("[]") == after.strip("[]")
    if imports == "torch":
        assert before == "['torch'"
    if imports == "jax.numpy":
        assert before == "['jax'"
