"""Policies mean the same in batches, streams, rounds and jobs, and the global model is the authority in all of them."""

import ast
import logging
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn.aggregation.plan import check_fitting
from fed_learn.aggregation.round import Round
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.policies import Policies
from fed_learn.server.model_aggregator import Aggregator
from fed_learn.weights import WeightDict

pytestmark = pytest.mark.quick


def sent(name: str, weights: WeightDict, kind: fl.Kind = fl.Kind.FULL, weight: float = 1) -> fl.Contribution:
    return fl.Contribution(name, weights, weight, round=0, kind=kind)


def in_a_batch(contributions: list[fl.Contribution], **settings: Any) -> WeightDict:
    return fl.weighted_average(contributions, **settings)


def in_a_stream(contributions: list[fl.Contribution], **settings: Any) -> WeightDict:
    mean = fl.Accumulator(**settings)
    for one in contributions:
        mean.add(one)
    return mean.result()


BOTH = pytest.mark.parametrize("combine", [in_a_batch, in_a_stream])


@BOTH
@pytest.mark.parametrize("declared", [False, True])
def test_the_difference_of_what_is_kept_is_zero(combine: Any, declared: bool) -> None:
    model: WeightDict = {"w": np.zeros(2), "bn": np.full(2, 5.0)}
    both = [sent(name, {"w": np.ones(2), "bn": np.ones(2)}, fl.Kind.DIFF) for name in ("a", "b")]
    kind = {"kind": fl.Kind.DIFF} if declared and combine is in_a_stream else {}
    made = combine(both, like=model, policies={"bn": "keep"}, **kind)
    assert {name: array.tolist() for name, array in made.items()} == {"w": [1, 1], "bn": [0, 0]}


@BOTH
@pytest.mark.parametrize(
    ("own", "error"),
    [
        ({"q": np.array([9, 9], np.uint8)}, fl.NotSameError),
        ({"q": np.array([1, 2], np.uint8), "n": np.ones(1, np.float32)}, fl.DtypeError),
        ({"q": np.array([1, 2], np.uint8), "s": np.zeros((2, 1))}, fl.ShapeError),
        ({"q": np.array([1.0, 2.0])}, fl.NotSameError),
    ],
    ids=["another value", "another dtype", "another shape", "the same as numbers"],
)
def test_the_global_model_is_the_authority_for_what_is_not_averaged(combine: Any, own: Any, error: Any) -> None:
    model: WeightDict = {
        "w": np.zeros(1),
        "n": np.array([3]),
        "s": np.zeros(2),
        "q": np.array([1, 2], np.uint8),
    }
    policies = {"n": "max", "s": "sum", "q": "same"}
    good = {**model, "n": np.array([4])}
    made = combine([sent("a", good), sent("b", good)], like=model, policies=policies)
    assert {name: array.tolist() for name, array in made.items()} == {"w": [0], "n": [4], "s": [0, 0], "q": [1, 2]}
    with pytest.raises(error, match=r"^a: '"):
        combine([sent("a", {**good, **own}), sent("b", {**good, **own})], like=model, policies=policies)


@BOTH
def test_a_difference_of_what_is_the_same_is_zero_or_refused(combine: Any) -> None:
    model: WeightDict = {"w": np.zeros(1), "mask": np.array([0.0, -np.inf])}
    none: WeightDict = {"w": np.ones(1), "mask": np.array([0.0, np.nan])}
    moved: WeightDict = {"w": np.ones(1), "mask": np.ones(2)}
    policies = {"mask": "same"}
    with pytest.raises(fl.NotSameError, match="a: 'mask' is not the same as that of like"):
        combine([sent(name, moved, fl.Kind.DIFF) for name in ("a", "b")], like=model, policies=policies)
    made = combine([sent(name, none, fl.Kind.DIFF) for name in ("a", "b")], like=model, policies=policies)
    assert np.array_equal(made["mask"], none["mask"], equal_nan=True)


@pytest.mark.not_quick
def test_a_global_model_without_values_sets_forms_and_leaves_values_to_the_contributions() -> None:
    torch = pytest.importorskip("torch")
    like = {"w": torch.zeros(1, device="meta"), "q": torch.zeros(2, dtype=torch.uint8, device="meta")}
    both: list[WeightDict] = [{"w": np.array([k], np.float32), "q": np.array([7, 9], np.uint8)} for k in (1, 3)]
    made = fl.weighted_average(both, like=like, policies={"q": "same"})
    assert [made["w"].tolist(), made["q"].tolist()] == [[2], [7, 9]]


def test_streams_with_other_policies_are_not_merged() -> None:
    def stream(policy: str | None, value: int, named: str) -> fl.Accumulator:
        mean = fl.Accumulator(policies={"n": policy} if policy else None)
        mean.add({"w": np.ones(1), "n": np.array([value])}, 1, named)
        return mean

    for mine, other in [("sum", "max"), ("max", "sum"), ("same", "max"), (None, "sum"), ("sum", None)]:
        with pytest.raises(fl.MergeError, match=f"'n' has the policy '{mine or 'mean'}' here, and '{other or 'mean'}'"):
            stream(mine, 3, "a").merge(stream(other, 4, "b"))
    empty = fl.Accumulator(policies={"n": "max"})
    with pytest.raises(fl.MergeError, match="other has the policies"):
        empty.merge(stream("sum", 3, "a"))
    one = stream("sum", 3, "a")
    one.merge(stream("sum", 4, "b"))
    assert one.result()["n"].tolist() == [7]


@pytest.mark.parametrize("partial", ["same", "refuse", "average"])
@pytest.mark.parametrize("name", ["s", "m", "q"])
def test_a_part_without_a_variable_that_is_not_averaged_is_a_part(partial: str, name: str) -> None:
    model: WeightDict = {"w": np.zeros(1), "s": np.array([0]), "m": np.array([0]), "q": np.array([5], np.uint8)}
    policies = {"s": "sum", "m": "max", "q": "same"}
    whole = {**model, "s": np.array([1])}
    part = {key: array for key, array in whole.items() if key != name}
    this = Round(AggregationSettings(partial=partial, policies=Policies(policies)), number=0, model=model)
    this.receive(sent("a", whole))
    if partial == "refuse":
        with pytest.raises(fl.NamesError, match=f"b: .* misses '{name}'"):
            this.receive(sent("b", part))
        return
    this.receive(sent("b", part))
    refused = [(one.contributor, str(error)) for one, error in this.close()]
    if partial == "same" and name != "q":  # codes need not be sent: the global model has them
        assert refused == [
            (
                "b",
                f"b: misses '{name}', compared with what 1 of the round's contributions hold; partial='average' "
                "averages each variable over those who sent it",
            )
        ]
    else:
        assert refused == []
        assert this.combine().mean["s"].tolist() == [2 if name != "s" else 1]


def test_a_part_that_is_the_same_from_all_is_told_with_what_is_not_averaged(caplog: pytest.LogCaptureFixture) -> None:
    model: WeightDict = {"w": np.zeros(1), "s": np.array([0])}
    this = Round(AggregationSettings(policies=Policies({"s": "sum"})), number=0, model=model)
    for name in ("a", "b"):
        this.receive(sent(name, {"w": np.ones(1)}))
    assert this.close() == []
    assert "clients send 1 of the global model's 2 variables" in caplog.text


@pytest.mark.parametrize(
    ("policy", "odd", "error", "text"),
    [
        ("same", np.array([2]), fl.NotSameError, "c: 'v' is not the same as that of 2 of the round's contributions"),
        ("sum", np.array([1, 1]), fl.ShapeError, r"c: 'v' has shape \(2,\)"),
        ("max", np.array([1.0]), fl.DtypeError, "c: 'v' has dtype float64"),
    ],
)
@pytest.mark.parametrize("partial", ["same", "average"])
def test_one_that_deviates_is_refused_alone_where_the_model_is_not_known(
    partial: str, policy: str, odd: Any, error: type[Exception], text: str
) -> None:
    this = Round(AggregationSettings(partial=partial, policies=Policies({"v": policy})), number=0)
    for name, value in [("a", np.array([1])), ("b", np.array([1])), ("c", odd)]:
        this.receive(sent(name, {"w": np.ones(1), "v": value}))
    ((refused, why),) = this.close()
    assert refused.contributor == "c"
    with pytest.raises(error, match=text):
        raise why
    made = this.combine()
    assert {**made.constants, **made.mean}["w"].tolist() == [1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_value_that_cannot_be_summed_exactly_is_refused_when_it_comes(stream: bool) -> None:
    model: WeightDict = {"w": np.zeros(1), "s": np.zeros(1)}
    this = Round(AggregationSettings(policies=Policies({"s": "sum"}), stream=stream), number=0, model=model)
    this.receive(sent("a", {"w": np.ones(1), "s": np.ones(1)}))
    with pytest.raises(fl.ExactDomainError, match="evil"):
        this.receive(sent("evil", {"w": np.ones(1), "s": np.array([1e300])}))
    this.close()
    assert this.combine().mean["s"].tolist() == [1]


def test_a_sum_of_integers_out_of_range_blames_nobody_alone() -> None:
    largest = np.array([2**31 - 1], np.int32)
    both = [sent(name, {"w": np.ones(1), "n": largest}) for name in ("a", "b")]
    with pytest.raises(
        fl.IntegerRangeError, match="'n' is summed, and with that of the others the sum leaves the range"
    ):
        fl.weighted_average(both, policies={"n": "sum"})


def test_a_variable_that_the_global_model_lacks_is_extra_whatever_is_kept() -> None:
    model: WeightDict = {"w": np.zeros(1), "bn1": np.zeros(1)}
    this = Round(AggregationSettings(policies=Policies({"bn": "keep"})), number=0, model=model)
    with pytest.raises(fl.NamesError, match="adds 'bn99'"):
        this.receive(sent("a", {**model, "bn99": np.zeros(1)}))


def test_nothing_that_counts_and_nothing_that_is_left_are_said() -> None:
    for policy in ("max", "sum", "same"):
        with pytest.raises(fl.EmptyAggregationError):
            fl.weighted_average([{"n": np.array([3])}], [0], policies={"n": policy})
    with pytest.raises(ValueError, match="all variables are local"):
        fl.weighted_average([{"n": np.array([3])}], policies={"n": "local"})


def test_comparing_large_codes_takes_no_copy_of_them() -> None:
    codes = np.zeros(20_000_000, np.uint8)
    model: WeightDict = {"w": np.zeros(1), "q": codes}
    this = Round(AggregationSettings(policies=Policies({"q": "same"})), number=0, model=model, own=False)
    tracemalloc.start()
    this.receive(sent("a", {"w": np.ones(1), "q": codes.copy()}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * codes.nbytes, "the copy that was sent, and a little"


def test_a_rule_that_makes_models_gets_codes_too() -> None:
    from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray

    class Median(Aggregator):
        def process(self, accumulator: list[fl.FLContext], fl_ctx: fl.FLContext) -> bool:
            model: Any = fl_ctx.get_model()
            for name in model.params:
                found: list[Any] = [item.get_model() for item in accumulator]
                diffs = [proto_to_ndarray(one.params[name]) for one in found]
                base = proto_to_ndarray(model.params[name])
                model.params[name].CopyFrom(ndarray_to_proto(base + np.median(diffs, axis=0).astype(base.dtype)))
            return False

    model: WeightDict = {
        "w": np.zeros(1, np.float32),
        "q.qweight": np.array([7], np.int32),
        "q.scales": np.ones(1, np.float32),
    }
    server = fl.FederatedServer(model, num_rounds=1, kind=fl.Kind.DIFF, aggregator=Median(), min_contributions=3)
    with server.begin() as job:
        job.start_round(0)
        for name, value in [("a", 1.0), ("b", 2.0), ("c", 9.0)]:
            job.receive(name, sent(name, {"w": np.array([value], np.float32)}, fl.Kind.DIFF))
        assert job.aggregate()
        job.end_round()
        assert {name: array.tolist() for name, array in job.weights.items()} == {
            "w": [2],
            "q.qweight": [7],
            "q.scales": [1],
        }


class Whole(fl.Learner):
    """Returns the whole of its own model, whatever it was sent."""

    def __init__(self, own: float) -> None:
        self.own = np.array([own])

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
        return fl.TrainingResult({"w": weights["w"] + 1, "bn": self.own}, aggregation_weight=1)

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> Mapping[str, float]:
        return {"accuracy": 1.0}


@pytest.mark.parametrize("kind", list(fl.Kind))
@pytest.mark.parametrize("own", [1000.0, float("nan")])
def test_what_is_local_leaves_a_client_neither_in_contributions_nor_in_its_best_model(
    own: float, kind: fl.Kind, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[list[float]] = []

    class Looks(fl.Handler):
        def receive_validation_results(self, ctx: fl.FLContext) -> None:
            assert ctx.model is not None
            assert ctx.model.weights is not None
            seen.append(ctx.model.weights["bn"].tolist())

    server = fl.FederatedServer(
        {"w": np.zeros(1), "bn": np.array([5.0])},
        num_rounds=2,
        kind=kind,
        policies={"bn": "local"},
        handlers=[Looks()],
    )
    clients = [fl.FederatedClient(name, Whole(own), kind=kind) for name in ("a", "b")]
    result = server.run(clients)
    assert [result.weights[name].tolist() for name in ("w", "bn")] == [[2], [5]]
    assert seen
    assert all(value == [5.0] for value in seen)
    assert set(result.cross_site) == {"a", "b"}
    assert "left out" not in caplog.text


def test_a_local_expression_that_fits_nothing_is_told_in_a_job(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fl.FederatedServer({"bn.weight": np.ones(1)}, num_rounds=1, policies={"batchnorm": "local"})
    assert "policies: 'batchnorm' fits none of the 1 variables ('bn.weight'): right if only clients" in caplog.text
    check_fitting({"batchnorm": "local"}, {"bn.weight": np.ones(1)})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", list(fl.Kind))
def test_integers_that_a_client_changed_are_averaged_and_told(
    kind: fl.Kind, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model: WeightDict = {"w": np.zeros(1), "index": np.arange(3), "steps": np.array(4), "mask": np.array([True, False])}
    changed = {**model, "index": np.array([0, 1, 4]), "steps": np.array(8)}
    if kind is fl.Kind.DIFF:
        del model["mask"], changed["mask"]
        model_is: WeightDict = {name: np.zeros_like(array) for name, array in model.items()}
        changed = {"w": np.zeros(1), "index": np.array([0, 0, 2]), "steps": np.array(4)}
    else:
        model_is = model
    this = Round(AggregationSettings(kind=kind, stream=stream), number=0, model=model)
    this.receive(sent("a", model_is, kind))
    assert not caplog.text
    this.receive(sent("b", changed, kind))
    this.receive(sent("c", changed, kind))
    assert caplog.text.count("b: 'index' (int64) is not that of the global model, and is averaged and rounded") == 1
    assert "'steps'" not in caplog.text
    assert "'mask'" not in caplog.text


@pytest.mark.not_quick
def test_the_policies_that_a_model_tells_are_those_of_a_job() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 1)
    model.register_buffer("index", torch.arange(4))
    shown = fl.describe(model)
    assert "policies=fl.describe(model).policies" in shown.table(200)
    both = [fl.get_weights(model), {**fl.get_weights(model), "index": np.array([1, 2, 3, 4])}]
    assert {row.name: row.policy for row in shown} == {"weight": "mean", "bias": "mean", "index": "same"}
    with pytest.raises(fl.NotSameError, match=r"contributions\[1\]: 'index'"):
        fl.weighted_average(both, policies=shown.policies)


@pytest.mark.parametrize(("kind", "told"), [(fl.Kind.FULL, True), (fl.Kind.DIFF, False)])
def test_sums_of_full_weights_on_a_global_value_are_told(
    kind: fl.Kind, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model: WeightDict = {"w": np.zeros(1), "seen": np.array([10])}
    this = Round(AggregationSettings(policies=Policies({"seen": "sum"}), kind=kind), number=0, model=model)
    for name in ("a", "b"):
        this.receive(sent(name, {"w": np.ones(1), "seen": np.array([15])}, kind))
    this.close()
    assert this.combine().mean["seen"].tolist() == [30]
    assert ("counts once for each client" in caplog.text) is told


@pytest.mark.parametrize(
    ("good", "evil"),
    [
        (np.array([3]), np.array([2**63 - 1])),
        (np.array([100], np.int8), np.array([120], np.int8)),
        (np.array([1.0], np.float32), np.array([3.4e38], np.float32)),
    ],
    ids=["int64", "int8", "float32"],
)
def test_one_value_that_drives_a_sum_out_of_range_is_refused_and_the_round_goes_on(good: Any, evil: Any) -> None:
    model: WeightDict = {"w": np.zeros(1), "n": np.zeros(1, good.dtype)}
    this = Round(AggregationSettings(policies=Policies({"n": "sum"})), number=0, model=model)
    for name, value in [("a", good), ("b", evil), ("c", evil)]:
        this.receive(sent(name, {"w": np.ones(1), "n": value}))
    refused = [(one.contributor, type(error)) for one, error in this.close()]
    assert refused == [("b", fl.IntegerRangeError), ("c", fl.IntegerRangeError)][: 2 if good.dtype != np.float32 else 1]
    total = good.astype(object) + (evil.astype(object) if good.dtype == np.float32 else 0)
    assert this.combine().mean["n"].tolist() == total.astype(good.dtype).tolist()


def test_sums_whose_parts_cancel_are_taken_whatever_their_order() -> None:
    for order in ([100, 100, -100], [100, -100, 100], [-100, 100, 100]):
        this = Round(
            AggregationSettings(policies=Policies({"n": "sum"})),
            number=0,
            model={"w": np.zeros(1), "n": np.zeros(1, np.int8)},
        )
        for name, value in zip("abc", order, strict=True):
            this.receive(sent(name, {"w": np.ones(1), "n": np.array([value], np.int8)}))
        assert this.close() == []


def test_a_boolean_variable_without_a_difference_is_as_good_as_not_sent() -> None:
    model: WeightDict = {"w": np.zeros(1), "mask": np.array([True, False])}
    this = Round(AggregationSettings(kind=fl.Kind.DIFF), number=0, model=model)
    this.receive(sent("a", {"w": np.ones(1)}, fl.Kind.DIFF))
    this.receive(sent("b", {"w": np.ones(1), "mask": np.zeros(2, bool)}, fl.Kind.DIFF))
    with pytest.raises(fl.DtypeError, match="c: 'mask' has dtype bool, which cannot hold a difference"):
        this.receive(sent("c", {"w": np.ones(1), "mask": np.ones(2, bool)}, fl.Kind.DIFF))
    assert this.close() == []
    assert {name: array.tolist() for name, array in this.combine().mean.items()} == {"w": [1]}


def test_a_mean_of_one_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model: WeightDict = {"a": np.zeros(1), "b": np.zeros(1)}
    this = Round(AggregationSettings(partial="average"), number=0, model=model)
    for name in ("x", "y", "z"):
        this.receive(sent(name, {"a": np.ones(1), **({"b": np.full(1, 666.0)} if name == "z" else {})}))
    assert this.close() == []
    assert this.combine().mean["b"].tolist() == [666]
    assert caplog.text.count("'b': sent by one of 3 contributions alone, whose value it is then") == 1


def test_clients_that_leave_a_local_variable_out_and_clients_that_send_it_go_together() -> None:
    this = Round(AggregationSettings(policies=Policies({"bn": "local"})), number=0)
    for name, own in [("a", {}), ("b", {"bn": np.ones(1)})]:
        this.receive(sent(name, {"w": np.ones(1), **own}))
    assert this.close() == []


def test_names_that_clients_make_up_meet_no_expression() -> None:
    """An expression such as this one takes twice as long for each letter: this name would take years."""
    slow = r"^(\w+\.?)+bn\d?\."
    model: WeightDict = {"w": np.zeros(1), "a.bn1.w": np.zeros(1)}
    this = Round(AggregationSettings(policies=Policies({slow: "local"})), number=0, model=model)
    with pytest.raises(fl.NamesError, match="adds 'a"):
        this.receive(sent("a", {"w": np.ones(1), "a" * 60: np.ones(1)}))


def test_the_advice_about_a_variable_is_an_expression_that_fits_it_alone() -> None:
    model: WeightDict = {"w": np.zeros(1), "layers[0]": np.array([1], np.uint8)}
    this = Round(AggregationSettings(policies=Policies({"layers": "same"})), number=0, model=model)
    with pytest.raises(fl.NotSameError) as caught:
        this.receive(sent("a", {**model, "layers[0]": np.array([2], np.uint8)}))
    advised = str(caught.value).partition("policies={")[2].partition(": 'keep'}")[0]
    check_fitting({ast.literal_eval(advised): "keep"}, {"layers[0]": np.zeros(1), "layers[01]": np.zeros(1)})
