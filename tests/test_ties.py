"""Tied variables: one variable with several names has one noise, one norm and one difference, and one name loads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clara_parts import params_of

import fed_learn as fl
from fed_learn.aggregation.differences import add_difference, difference
from fed_learn.client.fed_privacy import (
    LaplacianProtocol,
    PercentileProtocol,
    PrivacyProtocol,
    SVTProtocol,
    TrainContext,
)
from fed_learn.client.filters import apply_filters
from fed_learn.components.data_processor import DataProcessor
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.simulation.update_norms import PREFIX, UpdateNormHandler
from fed_learn.ties import twins
from fed_learn.weights import FrozenWeights

TIED = {"head.weight": "embedding.weight"}
PROTOCOLS: dict[str, Callable[[], PrivacyProtocol]] = {
    "percentile": lambda: PercentileProtocol(percentile=50, gamma=0.01),
    "laplacian": lambda: LaplacianProtocol(0.5, epsilon=8.0, gamma=0.1, tau=0.0, seed=3),
    "svt": lambda: SVTProtocol(0.5, epsilon=4.0, noise_var=4.0, gamma=0.1, tau=0.0, seed=3),
}


def language_model(seed: int = 0) -> Any:
    torch = pytest.importorskip("torch")

    class LanguageModel(torch.nn.Module):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Any) -> Any:
            return self.head(self.embedding(x))

    torch.manual_seed(seed)
    return LanguageModel()


def learner(model: Any, **arguments: Any) -> Any:
    torch = pytest.importorskip("torch")
    from fed_learn.integrations.torch import TorchLearner

    data = torch.utils.data.TensorDataset(torch.arange(8), torch.arange(8))
    return TorchLearner(model, data, data, **arguments)


class Own(fl.Learner):
    """A learner of a user's own, which adds 1 to the model and returns it in some form."""

    def __init__(self, model: Any, form: Callable[[Any], Any]) -> None:
        self.model, self.form = model, form

    def train(self, weights: Any, ctx: FLContext) -> Any:
        fl.set_weights(self.model, {name: array + array.dtype.type(1) for name, array in weights.items()})
        return self.form(self.model), 8

    def validate(self, weights: Any, ctx: FLContext) -> dict[str, float]:
        fl.set_weights(self.model, weights)
        return {"accuracy": 1.0}


class Seen(PrivacyProtocol):
    """Remembers the names that it got, and doubles the arrays in place."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def apply(self, model_diff: dict[str, Any], train_ctx: Any = None) -> Any:
        self.names = list(model_diff)
        for array in model_diff.values():
            array *= 2
        return model_diff


class Unchanged(DataProcessor):
    def process(self, data_ctx: FLContext, app_ctx: FLContext) -> FLContext:
        self.names = list(params_of(data_ctx))
        return data_ctx


def tied_weights(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(8, 4)).astype(np.float32)
    return {"embedding.weight": table, "bias": np.ones(3, np.float32), "head.weight": table}


# What holds one array.


def test_views_of_a_tied_torch_model_and_of_its_state_dict_hold_one_array_and_copies_one_each() -> None:
    model = language_model()
    for read in (model, model.state_dict()):
        assert twins(fl.get_weights(read, copy=False)) == TIED
        assert twins(fl.get_weights(read)) == {}
    assert twins(fl.get_weights(model, copy=False, only="head")) == {}


def test_parameters_with_equal_values_that_are_not_tied_hold_two_arrays() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].load_state_dict(model["a"].state_dict())
    assert twins(fl.get_weights(model, copy=False)) == {}


def test_parts_of_one_parameter_hold_arrays_of_their_own() -> None:
    torch = pytest.importorskip("torch")
    whole = torch.arange(6.0)
    assert twins(fl.get_weights({"a": whole[:3], "b": whole[3:], "c": whole[:2]}, copy=False)) == {}


def test_a_shared_leaf_of_a_jax_pytree_is_one_array_and_its_copies_are_two() -> None:
    jnp = pytest.importorskip("jax.numpy")
    table = jnp.ones((3, 2))
    tree = {"embedding": table, "head": table, "other": jnp.ones((3, 2))}
    assert twins(fl.get_weights(tree, copy=False)) == {"head": "embedding"}
    assert twins(fl.get_weights(tree)) == {}
    # No pytree is bound to keep them equal.
    loaded = fl.set_weights(tree, {"embedding": np.zeros((3, 2), np.float32)}, strict=False)
    assert (float(loaded["embedding"][0, 0]), float(loaded["head"][0, 0])) == (0.0, 1.0)


def test_a_layer_that_a_keras_model_uses_twice_has_one_name() -> None:
    keras = pytest.importorskip("keras")
    shared = keras.layers.Dense(3, name="shared")
    inputs = keras.Input((3,))
    weights = fl.get_weights(keras.Model(inputs, shared(shared(inputs))), copy=False)
    assert (list(weights), twins(weights)) == (["shared/kernel", "shared/bias"], {})


def test_frozen_weights_keep_one_array_for_tied_names() -> None:
    frozen = FrozenWeights(tied_weights())
    assert twins(frozen) == TIED
    assert twins(FrozenWeights.adopt(tied_weights())) == TIED
    assert list(frozen) == list(tied_weights())
    assert not frozen["head.weight"].flags.writeable
    assert frozen["head.weight"].tobytes() == tied_weights()["head.weight"].tobytes()


def test_differences_and_sums_keep_one_array_for_tied_names() -> None:
    trained, base = tied_weights(1), {name: array.copy() for name, array in tied_weights(2).items()}
    diff = difference(trained, base)
    moved = add_difference(base, diff)
    assert (twins(diff), twins(moved)) == (TIED, TIED)
    for name in trained:
        assert diff[name].tolist() == (trained[name].astype(float) - base[name]).astype(np.float32).tolist()
        assert moved[name].tolist() == (base[name].astype(float) + diff[name]).astype(np.float32).tolist()
    assert list(diff) == list(moved) == list(base)


def test_a_base_that_is_not_tied_gives_each_name_its_own_difference() -> None:
    trained, base = tied_weights(1), {name: array.copy() for name, array in tied_weights(2).items()}
    base["head.weight"] += 1
    diff = difference(trained, base)
    assert twins(diff) == {}
    np.testing.assert_allclose(diff["head.weight"], diff["embedding.weight"] - 1, rtol=1e-5)
    out = {name: np.empty_like(array) for name, array in base.items()}
    assert add_difference(base, {**diff, "head.weight": diff["embedding.weight"]}, out=out) is out


# Privacy.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_treats_a_tied_variable_as_it_does_a_model_that_has_it_once(protocol: str) -> None:
    tied = tied_weights()
    alone = {name: tied[name] for name in ("embedding.weight", "bias")}
    sent, expected = (dict(PROTOCOLS[protocol]().apply(weights)) for weights in (tied, alone))
    assert list(sent) == list(tied)
    assert sent["head.weight"] is sent["embedding.weight"]
    assert {name: sent[name].tobytes() for name in alone} == {name: a.tobytes() for name, a in expected.items()}
    assert 0 < np.count_nonzero(sent["head.weight"]) < sent["head.weight"].size


@pytest.mark.parametrize("protocol", ["laplacian", "svt"])
def test_equal_variables_that_are_not_tied_get_two_noises(protocol: str) -> None:
    apart = {name: array.copy() for name, array in tied_weights().items()}
    sent = PROTOCOLS[protocol]().apply(apart)
    assert sent["head.weight"].tobytes() != sent["embedding.weight"].tobytes()


def test_filters_get_a_tied_variable_once_and_what_they_make_of_it_is_sent_under_all_names() -> None:
    seen, processor, diff = Seen(), Unchanged(), FrozenWeights(tied_weights())
    sent = apply_filters([seen, processor], diff, TrainContext(), FLContext(), "site-1")
    assert seen.names == processor.names == ["embedding.weight", "bias"]
    assert (list(sent), twins(sent)) == (list(diff), TIED)
    assert all((sent[name] == 2 * diff[name]).all() for name in diff)


@pytest.mark.parametrize("kind", fl.Kind)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_tied_torch_model_trains_through_each_protocol(protocol: str, kind: fl.Kind) -> None:
    clients = [
        fl.FederatedClient(name, learner(language_model(1), seed=i), kind=kind, filters=[PROTOCOLS[protocol]()])
        for i, name in enumerate(("a", "b"))
    ]
    initial = fl.get_weights(language_model())
    weights = fl.FederatedServer(initial, num_rounds=2, kind=kind).run(clients).weights
    assert weights["embedding.weight"].tobytes() == weights["head.weight"].tobytes()
    assert weights["head.weight"].tobytes() != initial["head.weight"].tobytes()


FORMS: dict[str, Callable[[Any], Any]] = {
    "views": lambda model: fl.get_weights(model, copy=False),
    "state_dict": lambda model: model.state_dict(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_learner_that_returns_views_or_a_state_dict_tells_what_is_tied(form: str) -> None:
    client = fl.FederatedClient("a", Own(language_model(1), FORMS[form]), filters=[PROTOCOLS["laplacian"]()])
    weights = fl.FederatedServer(fl.get_weights(language_model()), num_rounds=1).run([client]).weights
    assert weights["embedding.weight"].tobytes() == weights["head.weight"].tobytes()


def test_two_noises_on_one_variable_are_refused_with_the_way_out() -> None:
    client = fl.FederatedClient("a", Own(language_model(1), fl.get_weights), filters=[PROTOCOLS["laplacian"]()])
    server = fl.FederatedServer(fl.get_weights(language_model()), num_rounds=1)
    with pytest.raises(fl.TiedVariablesError, match=r"return fl.get_weights\(model, copy=False\), which has one array"):
        server.run([client])


def test_a_jax_tree_with_a_shared_leaf_gets_one_noise() -> None:
    jnp = pytest.importorskip("jax.numpy")
    table = jnp.linspace(-1, 1, 8)
    trained = FrozenWeights(fl.get_weights({"embedding": table, "head": table}, copy=False))
    base = {name: np.zeros(8, np.float32) for name in trained}
    diff = FrozenWeights.adopt(difference(trained, base))
    sent = apply_filters([PROTOCOLS["svt"]()], diff, TrainContext(), FLContext(), "site-1")
    assert sent["embedding"] is sent["head"]


def test_a_keras_model_that_shares_a_layer_trains_through_a_protocol() -> None:
    keras = pytest.importorskip("keras")
    from fed_learn.integrations.keras import KerasLearner

    def model() -> Any:
        shared = keras.layers.Dense(4, name="shared")
        inputs = keras.Input((4,))
        made = keras.Model(inputs, keras.layers.Dense(2, name="out")(shared(shared(inputs))))
        made.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return made

    x, y = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])
    client = fl.FederatedClient("a", KerasLearner(model(), (x, y), (x, y)), filters=[PROTOCOLS["laplacian"]()])
    start = fl.get_weights(model())
    weights = fl.FederatedServer(start, num_rounds=1).run([client]).weights
    assert any(weights[name].tobytes() != start[name].tobytes() for name in start)


# Norms and means.


@pytest.mark.parametrize("kind", fl.Kind)
def test_the_norm_of_an_update_counts_a_tied_variable_once(kind: fl.Kind) -> None:
    table = np.array([3, 4], np.float32)
    sent = FrozenWeights({"embedding": table, "head": table, "bias": np.zeros(1, np.float32)})
    ctx = FLContext(model=fl.ModelData({name: np.zeros_like(array) for name, array in sent.items()}))
    ctx.set_prop(ContextKey.CONTRIBUTIONS, (fl.Contribution("site-1", sent, 1, kind=kind),))
    UpdateNormHandler().before_aggregation(ctx)
    assert ctx[ContextKey.METRICS][f"{PREFIX}site-1"] == 5.0


@pytest.mark.parametrize("rule", fl.rules.available())
def test_what_clients_make_together_is_equal_under_tied_names(rule: str) -> None:
    if fl.rules.find(rule).makes_model or rule == "lora":
        pytest.skip("it makes the model of a job, or takes adapters alone")
    models = [language_model(seed) for seed in range(5)]
    made = fl.aggregate([fl.get_weights(model) for model in models], [3, 1, 4, 1, 5], rule=rule)
    assert made["embedding.weight"].tobytes() == made["head.weight"].tobytes()
    fl.set_weights(models[0], made)


# Loading.


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_one_name_of_a_tied_variable_is_enough_to_load_it(name: str) -> None:
    model, value = language_model(1), np.full((8, 4), 2, np.float32)
    fl.set_weights(model, {name: value})
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.detach().numpy().tolist() == value.tolist()


def test_a_safetensors_file_of_a_tied_model_loads(tmp_path: Path) -> None:
    torch_files, files = pytest.importorskip("safetensors.torch"), pytest.importorskip("safetensors.numpy")
    torch_files.save_model(language_model(3), str(tmp_path / "model.safetensors"))
    weights = files.load_file(tmp_path / "model.safetensors")
    assert len(weights) == 1
    loaded = fl.set_weights(language_model(1), weights)
    assert loaded.head.weight.tolist() == language_model(3).head.weight.tolist()


def test_names_that_are_really_missing_are_still_refused() -> None:
    torch = pytest.importorskip("torch")
    model = language_model()
    model.head.bias = torch.nn.Parameter(torch.zeros(8))
    weights = fl.get_weights(model)
    with pytest.raises(fl.NamesError) as caught:
        fl.set_weights(model, {"head.weight": weights["head.weight"]})
    assert caught.value.missing == ("head.bias",)
    with pytest.raises(fl.NamesError) as caught:
        fl.set_weights(model, {"head.bias": weights["head.bias"]})
    assert set(caught.value.missing) == {"embedding.weight", "head.weight"}


def test_one_client_that_unties_a_variable_does_not_stop_the_training_of_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unties(fl.Learner):
        def train(self, weights: Any, ctx: FLContext) -> Any:
            moved = dict(weights)
            if ctx[ContextKey.ROUND] == 0:
                moved["head.weight"] = weights["head.weight"] + np.float32(0.001)
            return moved, 1

        def validate(self, weights: Any, ctx: FLContext) -> float:
            return 0.0

    clients = [
        fl.FederatedClient("a", learner(language_model(1))),
        fl.FederatedClient("b", learner(language_model(2))),
        fl.FederatedClient("evil", Unties()),
    ]
    initial = fl.get_weights(language_model())
    server = fl.FederatedServer(initial, num_rounds=3, min_contributions=1, on_bad_contribution="reject")
    result = server.run(clients)
    assert [report.accepted for report in result.reports] == [("a", "b", "evil")] * 3
    assert "the global model has two values for one variable, of which the first is loaded" in caplog.text
