"""What learners, evaluators and settings may be given as: numbers of any kind, and errors that say what is wanted."""

import warnings
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, NormEvaluator, Recorder, clients_of, initial_weights, two_clients

import fed_learn as fl
from fed_learn.arguments import check_count
from fed_learn.handlers import EarlyStoppingHandler
from fed_learn.values import number_of, split_metrics
from fed_learn.weights import FrozenWeights, as_weight_dict

pytestmark = pytest.mark.quick


class Returning:
    """A learner that derives from nothing, and returns what it is given."""

    def __init__(self, trained: Any, scored: Any = 0.5) -> None:
        self.trained = trained
        self.scored = scored

    def train(self, weights: Any, ctx: fl.FLContext) -> Any:
        return self.trained(weights) if callable(self.trained) else self.trained

    def validate(self, weights: Any, ctx: fl.FLContext) -> Any:
        return self.scored


def contribution_of(trained: Any, scored: Any = 0.5) -> fl.Contribution:
    """What a server accepts of a client whose learner returns these."""
    recorder = Recorder()
    server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=1, handlers=[recorder])
    server.run([fl.FederatedClient("a", Returning(trained, scored))])  # type: ignore[arg-type]
    (ctx,) = recorder.at(fl.EventType.RECEIVE_CONTRIBUTION)
    found: fl.Contribution = ctx[fl.ContextKey.CONTRIBUTION]
    return found


def failure_of(trained: Any, scored: Any = 0.5) -> Exception:
    """Why a client whose learner returns these leaves the job."""
    client = fl.FederatedClient("a", Returning(trained, scored))  # type: ignore[arg-type]
    client.start(1)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller looks at it
        client.train_round(0, lambda: {"w": np.zeros(1)})
    return caught.value


def torch_scalar(value: float) -> Any:
    torch = pytest.importorskip("torch")
    return torch.tensor(value, requires_grad=True)


def tensorflow_scalar(value: float) -> Any:
    return pytest.importorskip("tensorflow").constant(value)


def jax_scalar(value: float) -> Any:
    return pytest.importorskip("jax.numpy").asarray(value)


NUMBERS = {
    "int": int,
    "float": float,
    "numpy scalar": np.float32,
    "numpy int": np.uint8,
    "0-d array": np.array,
    "array of one": lambda value: np.array([value]),
    "fraction": Fraction,
    "decimal": Decimal,
}
TENSORS = {"torch": torch_scalar, "tensorflow": tensorflow_scalar, "jax": jax_scalar}
FORMS = [
    *(pytest.param(form, id=name) for name, form in NUMBERS.items()),
    *(pytest.param(form, id=name, marks=pytest.mark.not_quick) for name, form in TENSORS.items()),
]
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_a_number_of_any_kind_is_that_number_wherever_one_is_returned(form: Any) -> None:
    found = contribution_of(
        lambda weights: fl.TrainingResult(weights, form(12.0), form(3.0), {"loss": form(2.0)}), {"accuracy": form(1.0)}
    )
    assert (found.aggregation_weight, found.n_iter) == (12.0, 3)
    assert found.metrics == {"initial_validation_metric": 1.0, "initial_accuracy": 1.0, "loss": 2.0}
    assert {type(value) for value in found.metrics.values()} == {float}


@pytest.mark.parametrize("value", ["0.5", b"0.5", True, np.bool_(True), None, [0.5], np.zeros(2), {}, 1j], ids=repr)
def test_what_is_no_number_is_none(value: Any) -> None:
    assert number_of(value) is None


def test_what_is_no_number_among_metrics_is_information_and_refuses_nothing() -> None:
    told = {"host": "x", "converged": True, "histogram": [1, 2], "note": None}
    found = contribution_of(lambda weights: (weights, 10, {"loss": 0.25, **told}), {"accuracy": 0.5, "seen": "all"})
    assert found.metrics == {"initial_validation_metric": 0.5, "initial_accuracy": 0.5, "loss": 0.25}
    assert found.info == {"initial_seen": "all", **told, "histogram": (1, 2)}
    assert split_metrics({"loss": 1, **told}) == ({"loss": 1.0}, {**told, "histogram": (1, 2)})


@pytest.mark.parametrize("rest", [(), ({"loss": 0.25},), ({},), (None,)], ids=str)
def test_training_may_return_a_tuple(rest: tuple[Any, ...]) -> None:
    found = contribution_of(lambda weights: (weights, 10, *rest))
    assert (found.aggregation_weight, found.n_iter) == (10.0, None)
    assert found.metrics.get("loss") == (0.25 if rest and rest[0] else None)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"w": np.zeros(1)}, "returned a dict of 1 variable, 8 B, without the number of examples"),
        (np.zeros(1), "returned an ndarray"),
        (3, "returned an int"),
        (({"w": np.zeros(1)},), "returned a tuple of 1"),
        (({"w": np.zeros(1)}, 1, {}, 4), "returned a tuple of 4"),
    ],
    ids=str,
)
def test_training_that_returns_something_else_is_an_error_that_shows_the_wanted_form(returned: Any, says: str) -> None:
    error = failure_of(returned)
    assert type(error) is TypeError
    assert str(error).startswith(f"a: train {says}")
    assert "fl.TrainingResult(weights, aggregation_weight)" in str(error)


def test_metrics_of_training_that_are_no_dict_are_named() -> None:
    error = failure_of(({"w": np.zeros(1)}, 10, 0.5))
    assert str(error) == "a: train returned metrics 0.5; they must be a dict of names to numbers"


def test_validation_may_return_the_one_number() -> None:
    assert contribution_of(lambda weights: (weights, 1), np.float32(0.75)).metrics == {
        "initial_validation_metric": 0.75,
        "initial_accuracy": 0.75,
    }


@pytest.mark.parametrize(
    ("scored", "kind", "says"),
    [
        (None, TypeError, "a: validate returned None; it must return a dict such as {'accuracy': 0.9}, or that number"),
        ("0.9", TypeError, "a: validate returned '0.9'; it must return a dict"),
        (True, TypeError, "a: validate returned True; it must return a dict"),
        (np.zeros(3), TypeError, "a: validate returned an ndarray of shape (3,); it must return a dict"),
        ((0.1, 10), TypeError, "a: validate returned a tuple; it must return a dict"),
        ({"loss": 0.1, "f1": 0.2}, fl.MetricError, "a: validate returned 'loss', 'f1': no 'accuracy' to select by; "),
        ({}, fl.MetricError, "a: validate returned nothing: no 'accuracy' to select by; "),
        ({"accuracy": "good"}, fl.MetricError, "a: validate returned 'accuracy': 'accuracy' is 'good', no number; "),
    ],
    ids=str,
)
def test_validation_that_returns_something_else_is_an_error_that_names_it(
    scored: Any, kind: type[Exception], says: str
) -> None:
    error = failure_of(lambda weights: (weights, 1), scored)
    assert type(error) is kind
    assert str(error).startswith(says)


class Scored(NormEvaluator):
    def __init__(self, value: Any) -> None:
        self.value = value

    def evaluate(self, ctx: fl.FLContext) -> None:
        pass

    def get_metric(self) -> Any:
        return self.value


def validated(value: Any) -> float:
    ctx = fl.FLContext({fl.ContextKey.ROUND: 0}, model=fl.ModelData(FrozenWeights({"w": np.zeros(1)})))
    fl.fire_event(fl.EventType.END_AGGREGATION, [fl.ServerValidationHandler(Scored(value), 1)], ctx)
    metric: float = ctx[fl.ContextKey.BEST_AGGREGATED].metric
    return metric


@every_form
def test_an_evaluators_number_may_be_of_any_kind(form: Any) -> None:
    assert validated(form(2.0)) == 2.0


@pytest.mark.parametrize("value", [None, {"accuracy": 0.5}, "high", True, np.zeros(2)], ids=repr)
def test_an_evaluators_metric_that_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(fl.HandlerError, match=r"Scored.get_metric\(\) returned .*; it must return one number"):
        validated(value)


# Settings


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3)], ids=repr)
def test_a_count_may_be_an_integer_of_any_kind_and_is_kept_as_a_plain_one(value: Any) -> None:
    server = fl.FederatedServer(initial_weights(), num_rounds=value, min_contributions=value)
    validating = fl.ServerValidationHandler(NormEvaluator(), value)
    counts = (
        server.settings.num_rounds,
        server.settings.aggregation.min_contributions,
        EarlyStoppingHandler(value).patience,
    )
    assert (*counts, validating.num_rounds_per_valid) == (3, 3, 3, 3)
    assert all(type(count) is int for count in (*counts, validating.num_rounds_per_valid))


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, np.float32(3), "3", None], ids=repr)
def test_a_count_that_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="num_rounds must be an int"):
        check_count("num_rounds", value)


@pytest.mark.parametrize("handlers", [fl.ModelSelectionHandler(), fl.ModelSelectionHandler], ids=["one", "class"])
def test_a_handler_that_is_in_no_list_is_refused_and_shown_in_one(handlers: Any) -> None:
    with pytest.raises(
        TypeError, match=r"must be a list of handlers, .*: pass handlers=\[ModelSelectionHandler\(...\)\]"
    ):
        fl.FederatedServer(initial_weights(), num_rounds=1, handlers=handlers)


def test_handlers_may_come_from_a_generator_and_none_is_lost() -> None:
    recorder = Recorder()
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=(h for h in [recorder]))  # type: ignore[arg-type]
    server.run(two_clients())
    assert recorder.events[0] == fl.EventType.STARTUP


class OnlyTrains:
    def train(self, weights: Any, ctx: Any) -> Any:
        """Has no validate beside it."""


@pytest.mark.parametrize(
    ("learner", "says"),
    [
        (None, r"a: the learner None has no method train\(weights, ctx\)"),
        (OnlyTrains(), r"has no method validate\(weights, ctx\): derive from fl.Learner"),
        (AddingLearner, r"the learner is the class AddingLearner: pass an instance, AddingLearner\(...\)"),
    ],
    ids=["None", "trains alone", "class"],
)
def test_what_is_no_learner_is_refused_by_the_client(learner: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        fl.FederatedClient("a", learner)


def test_clients_that_are_in_no_list_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a list of clients, .*: pass run\(\[...\]\)"):
        fl.FederatedServer(initial_weights(), num_rounds=1).run(fl.FederatedClient("a", AddingLearner()))  # type: ignore[arg-type]


# Something else in the place of weights

ARRAYS = {"w": np.zeros((2, 3)), "b": np.zeros(3)}
INSTEAD = {
    "list of arrays": (list(ARRAYS.values()), "are a list of 2 arrays without names", "dict(zip(names, them))"),
    "checkpoint": ({"model": ARRAYS, "epoch": 3}, "looks like a checkpoint", "pass checkpoint['model']"),
    "number beside": ({**ARRAYS, "epoch": 3}, "'epoch' is a builtins.int, not a numpy array", "leave it out"),
    "path": ("model.safetensors", "are a str", "load what it names"),
    "model data": (fl.ModelData(ARRAYS), "are a ModelData", "pass its .weights"),
}
USES = {
    "check": lambda weights: as_weight_dict(weights),
    "average": lambda weights: fl.weighted_average([weights, weights], [1, 1]),
    "accumulator": lambda weights: fl.Accumulator().add(weights, 1),
    "server": lambda weights: fl.FederatedServer(weights, num_rounds=1),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(("weights", "what", "instead"), INSTEAD.values(), ids=INSTEAD)
def test_what_is_no_weight_dict_is_named_with_what_to_pass_instead(
    weights: Any, what: str, instead: str, use: Any
) -> None:
    with pytest.raises(fl.WeightsTypeError) as caught:
        use(weights)
    assert what in str(caught.value)
    assert instead in str(caught.value)


@pytest.mark.not_quick
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_model_in_the_place_of_its_weights_is_named(framework: str, use: Any) -> None:
    module = pytest.importorskip(framework)
    model = (
        module.nn.Linear(2, 1)
        if framework == "torch"
        else module.Sequential([module.Input((2,)), module.layers.Dense(1)])
    )
    with pytest.raises(fl.WeightsTypeError, match=r"are a model \((Linear|Sequential); pass fl.get_weights\(model\)\)"):
        use(model)


@pytest.mark.not_quick
@pytest.mark.parametrize(
    ("weights", "what", "instead"),
    [
        pytest.param(*case, id=name) for name, case in INSTEAD.items() if name != "list of arrays"
    ],  # a model knows the order
)
def test_a_model_is_not_loaded_with_what_is_no_weight_dict(weights: Any, what: str, instead: str) -> None:
    model = pytest.importorskip("torch").nn.Linear(3, 2)
    with pytest.raises(fl.WeightsTypeError) as caught:
        fl.set_weights(model, weights)
    assert what in str(caught.value)
    assert instead in str(caught.value)


# Short reprs


def test_what_is_printed_holds_counts_and_scores_and_no_arrays() -> None:
    weights: dict[str, Any] = {"w": np.arange(300_000, dtype=np.float32), "b": np.zeros(2)}
    frozen = FrozenWeights(weights)
    assert repr(fl.Contribution("site-1", weights, 120, round=0)) == (
        "Contribution('site-1', 2 variables, 1.2 MB, aggregation_weight=120, round=1)"
    )
    assert repr(fl.Contribution("b", None, 1.5, kind=fl.Kind.DIFF)) == (
        "Contribution('b', no weights, aggregation_weight=1.5, kind=<Kind.DIFF: 'diff'>)"
    )
    assert repr(fl.BestModel(2, 0.9, "accuracy", frozen)) == "BestModel(round=3, accuracy=0.9, 2 variables, 1.2 MB)"
    assert repr(frozen) == "FrozenWeights(2 variables, 1.2 MB)"
    assert repr(fl.ModelData(weights)) == "ModelData(2 variables, 1.2 MB)"
    assert repr(fl.TrainingResult(weights, 120, metrics={"loss": 0.5, "all": weights["w"]})) == (
        "TrainingResult(2 variables, 1.2 MB, aggregation_weight=120, metrics={'loss': 0.5})"
    )
    accumulator = fl.Accumulator()
    assert repr(accumulator) == "Accumulator(0 contributions, no weights, total_weight=0)"
    accumulator.add(weights, 120)
    assert repr(accumulator) == "Accumulator(1 contribution, 2 variables, 1.2 MB, total_weight=120)"


def test_a_job_is_printed_by_what_came_of_it() -> None:
    server = fl.FederatedServer(initial_weights(), num_rounds=2, handlers=[fl.ModelSelectionHandler()])
    clients = two_clients()
    assert repr(server) == "FederatedServer(3 variables, 56 B, num_rounds=2, handlers=[ModelSelectionHandler])"
    assert repr(clients[0]) == "FederatedClient('a', AddingLearner, kind='full')"
    assert repr(server.run(clients)) == (
        "JobResult(2 rounds, 3 variables, 56 B, "
        "best=BestModel(round=1, initial_validation_metric=0.5, 3 variables, 56 B), selection=0.5)"
    )


@pytest.mark.parametrize("weights", [None, [], 3, {"w": 3}, {"w": None}], ids=repr)
def test_a_repr_never_raises_whatever_the_weights_are(weights: Any) -> None:
    assert repr(fl.Contribution("a", weights, None)).startswith("Contribution('a', ")  # type: ignore[arg-type]


def test_a_learner_with_more_scores_than_are_taken_is_selected_by_its_own_one_that_stands_last() -> None:
    class Many(AddingLearner):
        def validate(self, weights: Any, ctx: fl.FLContext) -> Any:
            return {**{f"class-{i}": 0.5 for i in range(1500)}, "accuracy": weights["w"].sum()}

    selection = fl.ModelSelectionHandler()
    server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=2, handlers=[selection])
    result = server.run(clients_of({"a": Many(1), "b": Many(3)}))
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (2, 4.0)


def test_a_learner_that_derives_from_nothing_takes_part() -> None:
    learners: Mapping[str, Any] = {"a": Returning(lambda w: ({"w": w["w"] + 1}, 1)), "b": Returning(None)}
    server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=2, min_contributions=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = server.run(clients_of(learners))
    assert result.weights["w"].tolist() == [2.0]
    assert [report.absent for report in result.reports] == [("b",), ("b",)]
