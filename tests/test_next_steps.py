"""Wrong calls that newcomers make: each error says what to do next, and what it says works."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from federation import AddingLearner

import fed_learn as fl

W: Any = {"fc.weight": np.array([[1, 2]], np.float32), "fc.bias": np.array([3], np.float32)}
ARRAYS: Any = list(W.values())


def says(call: Callable[[], Any], error: type[Exception], *words: str) -> str:
    """The message of the error that a call raises, in which the words are."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    for word in words:
        assert word in text
    return text


def bits(weights: Any) -> Any:
    return {name: np.asarray(array).tobytes() for name, array in weights.items()}


# Prefixes.


@pytest.mark.parametrize(
    ("prefix", "whose"),
    [
        ("module.", "torch.nn.DataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("_module.", "Opacus"),
        ("base_model.model.", "PEFT"),
        ("ema.", ""),
        ("shadow.", ""),
        ("averaged.", ""),
    ],
)
def test_a_prefix_is_taken_away_by_the_call_that_the_error_names(prefix: str, whose: str) -> None:
    longer = {prefix + name: array for name, array in W.items()}
    advice = f"fl.without_prefix(weights, {prefix!r}) makes them the same"
    says(lambda: fl.weighted_average([W, longer]), fl.NamesError, whose, advice)
    says(lambda: fl.weighted_average([longer], like=W), fl.NamesError, advice)
    says(lambda: fl.Accumulator(like=W).add(longer, 1), fl.NamesError, advice)
    assert bits(fl.weighted_average([W, fl.without_prefix(longer, prefix)])) == bits(W)


def test_names_that_the_expected_ones_have_in_front_are_added_as_the_error_says() -> None:
    longer = {f"module.{name}": array for name, array in W.items()}
    text = says(lambda: fl.weighted_average([longer, W]), fl.NamesError, "All that is missed has 'module.' in front")
    change = text[text.index("{") : text.index("}") + 1]
    assert change == "{'module.' + name: array for name, array in weights.items()}"
    assert {"module." + name for name in W} == longer.keys()


def test_the_average_that_torch_keeps_of_a_model_loads_without_its_prefix_and_its_count() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    advice = ("torch.optim.swa_utils.AveragedModel", "fl.without_prefix(weights, 'module.')")
    says(lambda: fl.set_weights(model, averaged.state_dict()), fl.NamesError, *advice)
    says(lambda: fl.weighted_average([model.state_dict(), averaged.state_dict()]), fl.NamesError, *advice)
    fl.set_weights(model, fl.without_prefix(averaged.state_dict(), "module."))
    assert list(fl.without_prefix(averaged.state_dict(), "module.")) == ["weight", "bias"]


def test_a_part_that_was_compiled_gets_its_names_back() -> None:
    torch = pytest.importorskip("torch")
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    compiled = torch.nn.Sequential(torch.compile(plain[0], backend="eager"), plain[1])
    state = compiled.state_dict()
    part = {name: value for name, value in state.items() if "_orig_mod" in name}
    says(
        lambda: fl.weighted_average([plain.state_dict(), state]),
        fl.NamesError,
        "has '_orig_mod.' in it, as torch.compile has it: fl.without_prefix(weights, '_orig_mod.')",
    )
    assert len(part) == 2
    assert list(fl.without_prefix(state, "_orig_mod.")) == list(plain.state_dict())


def test_a_prefix_that_some_names_lack_is_refused() -> None:
    mixed = {"module.a": 1, "b": 2, "c": 3}
    says(lambda: fl.without_prefix(mixed, "module."), fl.NamesError, "'b' and 1 more of 3 names lacks 'module.'")
    assert fl.without_prefix({name: 1 for name in mixed if name.startswith("module.")}, "module.") == {"a": 1}
    says(lambda: fl.without_prefix({"a": 1}, "_orig_mod."), fl.NamesError, "'a' of 1 names lacks '_orig_mod.'")
    twice = {"a._orig_mod.w": 1, "a.w": 2}
    says(lambda: fl.without_prefix(twice, "_orig_mod."), fl.NamesError, "'a._orig_mod.w' and another name become one")


# Names of Keras.


def test_layers_that_keras_numbered_are_named_or_mapped_as_the_error_says() -> None:
    keras = pytest.importorskip("keras")

    def model(*names: str) -> Any:
        layers = [keras.layers.Dense(2, **({"name": name} if name else {})) for name in names]
        return keras.Sequential([keras.Input((4,)), *layers], **({"name": "net"} if names[0] else {}))

    first, second = model("", ""), model("", "")
    weights = [fl.get_weights(one) for one in (first, second)]
    advice = ("name the layers", "keras.utils.clear_session()", "map with fl.align")
    for call in (
        lambda: fl.weighted_average(weights),
        lambda: fl.set_weights(first, weights[1]),
        lambda: fl.set_weights(first, weights[1], strict=False),
    ):
        assert says(call, fl.NamesError, *advice).count("What is added differs in the numbers") == 1
    fl.weighted_average([weights[0], fl.align(second, first)(weights[1])])
    fl.weighted_average([fl.get_weights(model("in", "out")) for _ in range(2)])
    cleared = []
    for _ in range(2):
        keras.utils.clear_session()
        cleared.append(fl.get_weights(model("", "")))
    fl.weighted_average(cleared)


# Lists of arrays.


def test_lists_of_arrays_are_taken_in_the_order_of_like() -> None:
    other = [3 * array for array in ARRAYS]
    named = dict(zip(W, other, strict=True))
    expected = bits(fl.weighted_average([W, named], [1, 3]))
    text = says(lambda: fl.weighted_average([ARRAYS, other], [1, 3]), fl.WeightsTypeError, "in the order of like=")
    assert "dict(zip(names, them))" in text
    accumulator, row = fl.Accumulator(like=W), cast(Any, tuple(other))
    accumulator.add(ARRAYS, 1)
    accumulator.add(row, 3, "b")
    for mean in (
        fl.weighted_average([ARRAYS, other], [1, 3], like=W),
        fl.aggregate([ARRAYS, named], [1, 3], like=W),
        fl.weighted_average([fl.Contribution("a", ARRAYS, 1), fl.Contribution("b", named, 3)], like=W),
        accumulator.result(),
    ):
        assert (list(mean), bits(mean)) == (list(W), expected)


def test_lists_of_arrays_are_taken_where_some_variables_have_a_policy() -> None:
    other = [3 * array for array in ARRAYS]
    settings: Any = {"like": W, "policies": {"bias": "max"}}
    accumulator = fl.Accumulator(**settings)
    for weights in (ARRAYS, other):
        accumulator.add(cast(Any, weights), 1)
    for mean in (fl.weighted_average([ARRAYS, other], **settings), accumulator.result()):
        assert {name: array.tolist() for name, array in mean.items()} == {"fc.weight": [[2, 4]], "fc.bias": [9]}
    says(
        lambda: fl.weighted_average([ARRAYS[:1]], **settings),
        fl.NamesError,
        "has 1 arrays in a list, for the 2 variables",
    )


def test_lists_of_another_length_or_of_other_shapes_are_refused_with_the_usual_errors() -> None:
    wrongs: Any = (
        (ARRAYS[:1], fl.NamesError, "has 1 arrays in a list, for the 2 variables of like"),
        ([*ARRAYS, ARRAYS[0]], fl.NamesError, "has 3 arrays in a list"),
        (ARRAYS[::-1], fl.ShapeError, "'fc.weight' has shape (1,), expected (1, 2)"),
        ([array.astype(np.float64) for array in ARRAYS], fl.DtypeError, "float64"),
    )
    for wrong, error, words in wrongs:
        says(partial(fl.weighted_average, [wrong], like=W), error, "contributions[0]", words)


def test_a_model_loads_a_list_in_its_own_order() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(2, 1))
    assert bits(fl.get_weights(fl.set_weights(model, ARRAYS))) == bits(W)
    says(lambda: fl.set_weights(model, ARRAYS[:1]), fl.NamesError, "has 1 arrays in a list, for the 2 variables")
    says(lambda: fl.set_weights(model, ARRAYS[::-1]), fl.ShapeError, "fc.weight")


def test_what_keras_gives_as_a_list_loads_and_averages_in_its_order() -> None:
    keras = pytest.importorskip("keras")
    models = [keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)])] * 2
    mean = fl.weighted_average([model.get_weights() for model in models], like=fl.get_weights(models[0]))
    assert bits(mean) == bits(fl.get_weights(models[0]))
    fl.set_weights(models[0], models[1].get_weights())


# Something else in the place of weights.


def test_a_checkpoint_says_which_entry_holds_the_weights() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    checkpoint: Any = {"epoch": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    says(lambda: fl.weighted_average([checkpoint]), fl.WeightsTypeError, "pass checkpoint['model']")
    says(lambda: fl.set_weights(model, checkpoint), fl.WeightsTypeError, "pass checkpoint['model']")
    fl.weighted_average([checkpoint["model"]])
    both: Any = {"epoch": 1, "model": W, "ema": W}
    says(lambda: fl.Accumulator().add(both, 1), fl.WeightsTypeError, "checkpoint['model'] or checkpoint['ema']")
    says(lambda: fl.FederatedServer(both, num_rounds=1), fl.WeightsTypeError, "pass checkpoint['model']")
    advice = "pass fl.get_weights(model) of the model that it trains"
    says(lambda: fl.weighted_average([optimizer]), fl.WeightsTypeError, "an optimizer (Adam; ", advice)
    says(lambda: fl.set_weights(model, optimizer.state_dict()), fl.WeightsTypeError, "state of an optimizer", advice)
    says(lambda: fl.weighted_average([optimizer]), fl.WeightsTypeError, "or fl.get_weights(optimizer)")
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    fl.weighted_average([fl.get_weights(optimizer)])


def test_a_lazy_parameter_is_named_with_what_to_do() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.LazyLinear(3)
    says(
        lambda: fl.weighted_average([model.state_dict()]),
        fl.WeightsTypeError,
        "contributions[0]: 'weight' is not initialized yet: run one batch through its lazy module first",
    )
    model(torch.ones(1, 2))
    assert fl.weighted_average([model.state_dict()])["weight"].shape == (3, 2)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("model.safetensors", "safetensors.numpy.load_file(path)"),
        (Path("model.npz"), "numpy.load(path)"),
        ("model.pth", "torch.load(path, weights_only=True)"),
        ("model.keras", "fl.get_weights(keras.saving.load_model(path))"),
    ],
)
def test_a_path_says_how_to_read_what_it_names(path: Any, advice: str) -> None:
    says(lambda: fl.weighted_average([path]), fl.WeightsTypeError, advice)
    says(lambda: fl.weighted_average(path), fl.WeightsTypeError, advice, "pass a list of weight dicts")
    says(lambda: fl.get_weights(path), fl.ModelError, "load the model that it names, and pass that")


def test_files_are_read_as_the_error_says(tmp_path: Path) -> None:
    torch, files = pytest.importorskip("torch"), pytest.importorskip("safetensors.numpy")
    files.save_file(W, tmp_path / "model.safetensors")
    np.savez(tmp_path / "model.npz", **W)
    torch.save({name: torch.from_numpy(array) for name, array in W.items()}, tmp_path / "model.pt")
    with np.load(tmp_path / "model.npz") as npz:
        mean = fl.weighted_average(
            [
                files.load_file(tmp_path / "model.safetensors"),
                npz,
                torch.load(tmp_path / "model.pt", weights_only=True),
            ]
        )
    assert bits(mean) == bits(W)


class Holder:
    """As `JobResult`s and other things that hold weights."""

    weights = W


ADVICE: dict[str, tuple[Any, str]] = {
    "one array": (np.ones(3), "give it a name: {'w': array}"),
    "a generator": ((array for array in ARRAYS), "pass fl.get_weights(model)"),
    "a list of dicts": ([W, W], "all of them to fl.weighted_average"),
    "a holder": (Holder(), "pass its .weights"),
    "a class": (Holder, "the class Holder (pass fl.get_weights() of a model that you made of it)"),
    "nested": ({"params": {"dense": {"kernel": np.ones(2)}}}, "fl.get_weights(weights) gives each array of a"),
    "a list of arrays inside": ({"shadow_params": ARRAYS}, "pass dict(zip(names, weights['shadow_params']))"),
}


@pytest.mark.parametrize(("wrong", "advice"), ADVICE.values(), ids=ADVICE)
def test_what_is_no_weight_dict_says_what_to_pass(wrong: Any, advice: str) -> None:
    says(lambda: fl.Accumulator().add(wrong, 1), fl.WeightsTypeError, advice)
    says(lambda: fl.FederatedServer(wrong, num_rounds=1), fl.WeightsTypeError, advice)
    says(lambda: fl.weighted_average([fl.Contribution("a", wrong, 1)]), fl.WeightsTypeError, "a: ", advice)


def test_models_of_jax_and_trees_of_its_arrays_go_through_get_weights() -> None:
    jax, equinox = pytest.importorskip("jax"), pytest.importorskip("equinox")
    model = equinox.nn.Linear(2, 1, key=jax.random.key(0))
    trees: Any = [{"params": {"dense": {"kernel": module.ones(2)}}} for module in (jax.numpy, np)]
    says(lambda: fl.weighted_average([model]), fl.WeightsTypeError, "a model (Linear; pass fl.get_weights(model))")
    for tree in trees:
        says(partial(fl.weighted_average, [tree]), fl.WeightsTypeError, "fl.get_weights(weights) gives each array")
        assert list(fl.weighted_average([fl.get_weights(tree)])) == ["params/dense/kernel"]
    fl.weighted_average([fl.get_weights(model)])


def test_what_flower_holds_says_how_to_get_arrays_of_it() -> None:
    common = pytest.importorskip("flwr.common")
    from fed_learn.integrations.flower import to_weights

    parameters, record = common.ndarrays_to_parameters(ARRAYS), common.ArrayRecord(ARRAYS)
    says(lambda: fl.weighted_average([parameters]), fl.WeightsTypeError, "flwr.common.parameters_to_ndarrays")
    says(lambda: fl.weighted_average([record]), fl.WeightsTypeError, "integrations.flower.to_weights(record)")
    mean = fl.weighted_average([common.parameters_to_ndarrays(parameters)], like=W)
    assert bits(mean) == bits(W)
    fl.weighted_average([to_weights(record)])


# The batch, and how much each counts.


def test_one_weight_dict_or_several_by_name_say_that_a_list_is_wanted() -> None:
    call: Any = fl.weighted_average
    says(lambda: call(W, W), fl.WeightsTypeError, "contributions is one weight dict: pass a list of them, [a, b, …]")
    says(lambda: call({"a": W, "b": W}), fl.WeightsTypeError, "pass list(contributions.values())")
    says(lambda: call(fl.Contribution("a", W, 1)), fl.WeightsTypeError, "is one Contribution: pass a list")
    says(lambda: fl.aggregate(cast(Any, 3)), fl.WeightsTypeError, "is an int: pass a list of weight dicts")
    assert bits(call(list({"a": W, "b": W}.values()))) == bits(W)


@pytest.mark.parametrize("wrong", [{"a": 1}, {1}, "3", 3, np.float32(3)], ids=["dict", "set", "text", "int", "scalar"])
def test_aggregation_weights_that_are_in_no_order_say_what_is_wanted(wrong: Any) -> None:
    advice = "pass a list with one number for each weight dict, in their order, or fl.Contributions"
    says(lambda: fl.weighted_average([W], wrong), fl.AggregationWeightError, "aggregation_weights ", advice)
    says(lambda: fl.aggregate([W], wrong), fl.AggregationWeightError, advice)


def test_aggregation_weights_may_be_any_row_of_numbers() -> None:
    other = {name: 3 * array for name, array in W.items()}
    expected = bits(fl.weighted_average([W, other], [1, 3]))
    rows: list[Any] = [(1, 3), np.array([1, 3]), np.array([[1], [3]], np.float32), (number for number in (1, 3))]
    makers: dict[str, Callable[[Any], list[Any]]] = {
        "torch": lambda torch: [torch.tensor([1, 3]), [torch.tensor(1.0), torch.tensor(3.0)]],
        "jax.numpy": lambda jnp: [jnp.array([1, 3])],
        "tensorflow": lambda tf: [tf.constant([1, 3])],
    }
    for framework, make in makers.items():
        rows += make(pytest.importorskip(framework))
    for row in rows:
        assert bits(fl.weighted_average([W, other], row)) == expected, row


def test_an_accumulator_says_what_it_adds_by() -> None:
    add: Any = fl.Accumulator().add
    says(lambda: add(W), fl.AggregationWeightError, "is missing: give the number of examples by which it counts")
    says(lambda: add(W, [1, 2]), fl.AggregationWeightError, "one for each contribution")
    says(lambda: add("site-1", W), fl.AggregationWeightError, "is not a number: it is that of examples")
    add(W, 3, "site-1")


# Order of arguments, and other words than the library's.


def test_arguments_in_another_order_and_kinds_of_other_names_say_what_is_right() -> None:
    wrong: Any = fl.Contribution(W, cast(Any, "a"), 1)
    order = "its order is Contribution(contributor, weights, aggregation_weight)"
    says(lambda: fl.weighted_average([wrong]), fl.UnknownContributorError, order)
    torch = pytest.importorskip("torch")
    model: Any = torch.nn.Linear(1, 1)
    says(lambda: fl.set_weights(W, model), fl.ModelError, "set_weights takes the model first, then the weights")
    fl.set_weights(model, fl.get_weights(model))
    says(lambda: fl.get_weights(Holder), fl.ModelError, "pass a model that you made of it")
    says(
        lambda: fl.FederatedServer(W, num_rounds=1, kind=cast(Any, "delta")),
        ValueError,
        "kind must be 'full' or 'diff'",
    )


def test_a_learner_in_the_place_of_its_client_says_what_to_pass() -> None:
    server = fl.FederatedServer(W, num_rounds=1)
    learner: Any = AddingLearner(1)
    says(
        lambda: server.run([learner]),
        TypeError,
        "an AddingLearner is no client: pass fl.FederatedClient(name, learner)",
    )
    server.run([fl.FederatedClient("a", learner)])


def test_a_prefix_is_told_where_variables_may_be_missing_too() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 1)
    wrapped = {"module.weight": np.zeros((1, 2), np.float32)}
    with pytest.raises(fl.NamesError, match=r"fl\.without_prefix\(weights, 'module\.'\) makes them the same"):
        fl.set_weights(model, wrapped, strict=False)


def test_an_entry_of_a_checkpoint_is_pointed_to_wherever_the_whole_is_given() -> None:
    torch = pytest.importorskip("torch")
    checkpoint = {"model": torch.nn.Linear(2, 1).state_dict(), "epoch": 3}
    with pytest.raises(fl.ModelError, match=r"it looks like a checkpoint; pass checkpoint\['model'\]"):
        fl.get_weights(checkpoint)


def test_names_of_peft_are_known_as_it_really_gives_them() -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    base = fl.get_weights(plain)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=1, target_modules=["0"], modules_to_save=["1"]))
    adapter = {name: array.numpy() for name, array in peft.get_peft_model_state_dict(model).items()}
    for weights, only in ((adapter, "lora_|modules_to_save"), (base, "base_layer|original_module")):
        with pytest.raises(fl.NamesError, match=r"peft\.set_peft_model_state_dict\(model, weights\)"):
            fl.set_weights(model, weights, only=only)


def test_only_what_torch_averages_has_a_count_beside_it() -> None:
    with pytest.raises(fl.NamesError, match=r"'n_averaged' of 2 names lacks 'ema\.' in front"):
        fl.without_prefix({"n_averaged": 2, "ema.a": 1}, "ema.")
    assert fl.without_prefix({"n_averaged": 2, "module.a": 1}, "module.") == {"a": 1}
