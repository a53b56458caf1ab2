"""Rules: the register, the mean as one of them, and a rule of a user's own wherever contributions are combined."""

from typing import Any, ClassVar

import numpy as np
import pytest

import fed_learn as fl
from fed_learn.aggregation.rules import ClaraRule, Given, MeanRule, Rule
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.server.settings import JobSettings
from fed_learn.weights import WeightDict

pytestmark = pytest.mark.quick


class Largest(Rule):
    """The largest value of each element, whatever contributions weigh."""

    name: ClassVar[str] = "largest"
    given: ClassVar[list[Given]] = []

    def combine(self, given: Given) -> WeightDict:
        self.given.append(given)
        return {n: np.max([np.asarray(row.arrays[n]) for row in given.rows], axis=0) for n in given.schema}


def contributions(**fields: Any) -> list[fl.Contribution]:
    return [
        fl.Contribution(f"site-{k}", {"w": np.array([float(k), -k]), "n": np.array(k)}, 1 + k % 2, **fields)
        for k in (3, 1, 2)
    ]


def test_the_register_finds_a_rule_by_its_name_and_takes_a_rule_as_it_is() -> None:
    own = Largest()
    assert "mean" in fl.rules.available()
    assert isinstance(fl.rules.find("mean"), MeanRule)
    assert fl.rules.find(own) is own
    with pytest.raises(ValueError, match=r"rule must be 'lora' or 'mean', not 'medium'"):
        fl.rules.find("medium")
    with pytest.raises(TypeError, match="rule must be the name of a rule or a Rule, not 3"):
        fl.rules.find(3)


def test_two_rules_cannot_have_one_name() -> None:
    class Mean(Largest):
        name: ClassVar[str] = "mean"

    with pytest.raises(ValueError, match="there is a rule 'mean' already"):
        fl.rules.register(Mean)
    assert isinstance(fl.rules.find("mean"), MeanRule)


@pytest.mark.parametrize("exact", [False, True])
def test_the_mean_as_a_rule_gives_the_bits_of_the_weighted_average(exact: bool) -> None:
    expected = fl.weighted_average(contributions(), exact=exact)
    found = fl.aggregate(contributions(), rule="mean", exact=exact)
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in expected.items()}
    memory = {"w": np.zeros(2), "n": np.array(0)}
    assert fl.aggregate(contributions(), out=memory) is memory
    assert memory["w"].tobytes() == fl.weighted_average(contributions())["w"].tobytes()


def test_a_rule_of_ones_own_is_given_what_counts_in_the_order_of_names() -> None:
    idle = fl.Contribution("site-0", {"w": np.array([9.0, 9.0]), "n": np.array(9)}, 0)
    made = fl.aggregate([*contributions(), idle], rule=Largest())
    assert made["w"].tolist() == [3, -1]
    assert [row.contributor for row in Largest.given[-1].rows] == ["site-1", "site-2", "site-3"]
    assert fl.aggregate([{"w": np.zeros(1)}, {"w": np.ones(1)}], rule=Largest())["w"].tolist() == [1]


def test_what_is_wrong_is_refused_before_a_rule_sees_it() -> None:
    before = len(Largest.given)
    with pytest.raises(fl.ShapeError, match="site-9"):
        fl.aggregate(
            [*contributions(), fl.Contribution("site-9", {"w": np.zeros(3), "n": np.array(1)}, 1)], rule=Largest()
        )
    with pytest.raises(fl.EmptyAggregationError):
        fl.aggregate([fl.Contribution("a", {"w": np.zeros(1)}, 0)], rule=Largest())
    assert len(Largest.given) == before


def test_a_rule_that_needs_all_at_once_does_not_stream() -> None:
    with pytest.raises(ValueError, match="rule 'largest' needs all contributions of a round at once"):
        AggregationSettings(rule=Largest(), stream=True)
    assert AggregationSettings(rule="mean", stream=True).stream


def test_a_rule_that_makes_the_model_of_a_job_needs_a_job() -> None:
    class Aggregator:
        def process(self, accumulator: Any, fl_ctx: Any) -> bool:
            raise AssertionError

    with pytest.raises(ValueError, match="rule 'clara' makes the new global model of a job"):
        fl.aggregate(contributions(), rule=ClaraRule(Aggregator()))
    with pytest.raises(ValueError, match="an aggregator works on differences"):
        AggregationSettings(rule=ClaraRule(Aggregator()))
    with pytest.raises(ValueError, match="aggregator= is a rule of its own"):
        fl.FederatedServer({"w": np.zeros(1)}, num_rounds=1, kind=fl.Kind.DIFF, rule=Largest(), aggregator=Aggregator())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(fl.Kind))
def test_a_job_of_our_server_combines_by_a_rule(kind: fl.Kind) -> None:
    server = fl.FederatedServer({"w": np.ones(2), "n": np.array(1)}, num_rounds=1, kind=kind, rule=Largest())
    with server.begin() as job:
        job.start_round(0)
        for sent in contributions(round=0, kind=kind):
            job.send_model(sent.contributor)
            job.receive(sent.contributor, sent)
        assert job.aggregate()
        report = job.end_round()
    added = 1 if kind is fl.Kind.DIFF else 0
    assert job.weights["w"].tolist() == [3 + added, -1 + added]
    assert int(job.weights["n"]) == 3 + added
    assert report.accepted == ("site-1", "site-2", "site-3")


def test_parts_that_are_averaged_each_by_itself_go_through_the_rule() -> None:
    settings = AggregationSettings(rule=Largest(), partial="average")
    this = fl.aggregation.round.Round(settings, number=0, model={"w": np.zeros(1), "b": np.zeros(1)})
    for who, weights in (("a", {"w": np.ones(1)}), ("b", {"w": np.full(1, 2.0), "b": np.full(1, 5.0)})):
        this.receive(fl.Contribution(who, weights, 1, round=0))
    assert this.close() == []
    assert {name: float(value[0]) for name, value in this.combine().mean.items()} == {"w": 2, "b": 5}


def test_settings_are_checked_and_frozen() -> None:
    settings = JobSettings(num_rounds=np.int64(3), aggregation=AggregationSettings(kind="diff"))  # type: ignore[arg-type]
    assert (settings.num_rounds, type(settings.num_rounds)) == (3, int)
    assert settings.aggregation.kind is fl.Kind.DIFF
    with pytest.raises(AttributeError):
        settings.num_rounds = 4  # type: ignore[misc]
    for wrong, text in (
        ({"partial": "some"}, "partial must be 'same' or 'average' or 'refuse', not 'some'"),
        ({"on_bad_contribution": "x"}, "on_bad_contribution must be 'raise' or 'reject', not 'x'"),
        ({"min_contributions": 0}, "min_contributions must be at least 1, not 0"),
        ({"kernel": "gpu"}, "gpu"),
        ({"partial": "average", "stream": True}, "which stream=True drops"),
    ):
        with pytest.raises(ValueError, match=text):
            AggregationSettings(**wrong)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        ({"w": np.zeros(2)}, "misses 'n'"),
        ({"w": np.zeros(3), "n": np.array(0)}, r"'w' has shape \(3,\), expected \(2,\)"),
        ({"w": np.array([np.nan, 0]), "n": np.array(0)}, "'w' at index .* is not finite"),
        ({"w": np.zeros(2, complex), "n": np.array(0)}, "'w' has dtype complex128"),
        (None, "weights are"),
        (ZeroDivisionError("no"), "ZeroDivisionError: no"),
    ],
    ids=["part", "shape", "NaN", "complex", "None", "raises"],
)
def test_what_a_rule_of_ones_own_does_wrong_is_told_by_its_name_and_fails_a_round(made: Any, text: str) -> None:
    class Faulty(Rule):
        name: ClassVar[str] = "faulty"

        def combine(self, given: Given) -> WeightDict:
            if isinstance(made, Exception):
                raise made
            return made  # type: ignore[no-any-return]

    with pytest.raises(fl.AggregatorError, match=f"rule 'faulty': .*{text}"):
        fl.aggregate(contributions(), rule=Faulty())
    this = fl.aggregation.round.Round(AggregationSettings(rule=Faulty()), number=0)
    this.receive(contributions()[0])
    this.close()
    with pytest.raises(fl.AggregatorError, match="rule 'faulty'"):
        this.combine()


def test_what_a_rule_of_ones_own_makes_is_rounded_and_goes_where_it_is_told() -> None:
    class Half(Rule):
        name: ClassVar[str] = "half"

        def combine(self, given: Given) -> WeightDict:
            return {n: np.asarray(given.rows[0].arrays[n], float) / 2 for n in given.schema}

    memory = {"w": np.zeros(2, np.float32)}
    assert fl.aggregate([{"w": np.array([1, 3], np.float32)}], rule=Half(), out=memory) is memory
    assert memory["w"].tolist() == [0.5, 1.5]
    assert fl.aggregate([{"w": np.array([1, 3], np.float32)}], rule=Half())["w"].dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_by_who_sent_it_though_the_rule_would_not_show_it(value: float) -> None:
    class Least(Rule):
        name: ClassVar[str] = "least"

        def combine(self, given: Given) -> WeightDict:
            return {n: np.min([row.arrays[n] for row in given.rows], axis=0) for n in given.schema}

    with pytest.raises(fl.NonFiniteError, match=r"contributions\[1\]: 'w' at index \(0,\)"):
        fl.aggregate([{"w": np.zeros(1)}, {"w": np.array([value])}], rule=Least())


def test_a_rule_may_refuse_settings_and_contributions() -> None:
    class Choosy(Largest):
        name: ClassVar[str] = "choosy"

        def check_settings(self, *, kind: fl.Kind, partial: str, exact: bool, stream: bool) -> None:
            if exact:
                raise ValueError("no exact sums")

        def check(self, contribution: fl.Contribution) -> None:
            if contribution.contributor == "site-2":
                raise fl.MetricError("site-2: has no age", contributor="site-2", metric="age")

    with pytest.raises(ValueError, match="no exact sums"):
        fl.aggregate(contributions(), rule=Choosy(), exact=True)
    with pytest.raises(fl.MetricError, match="site-2: has no age"):
        fl.aggregate(contributions(), rule=Choosy())
    model, chosen = {"w": np.zeros(2), "n": np.array(0)}, {"on_bad_contribution": "reject", "min_contributions": 2}
    server = fl.FederatedServer(model, num_rounds=1, rule=Choosy(), **chosen)  # type: ignore[arg-type]
    with server.begin() as job:
        job.start_round(0)
        for sent in contributions(round=0):
            job.receive(sent.contributor, sent)
        assert job.aggregate()
        assert job.end_round().accepted == ("site-1", "site-3")


def test_a_mistake_in_the_code_of_a_rule_is_no_clients_fault() -> None:
    class Broken(Largest):
        name: ClassVar[str] = "broken"

        def check(self, contribution: fl.Contribution) -> None:
            raise AttributeError("no such thing")

    server = fl.FederatedServer({"w": np.zeros(2), "n": np.array(0)}, num_rounds=1, rule=Broken())
    job = server.begin()
    job.start_round(0)
    with pytest.raises(fl.AggregatorError, match="rule 'broken': AttributeError: no such thing"):
        job.receive("site-3", contributions(round=0)[0])
    job.shut_down()


def test_a_rule_that_makes_the_model_is_checked_too() -> None:
    class Model(Largest):
        name: ClassVar[str] = "model"
        makes_model: ClassVar[bool] = True

        def combine(self, given: Given) -> WeightDict:
            return {"w": np.full(2, 7.0), "n": np.array(7)} if len(given.rows) > 1 else {"other": np.zeros(1)}

    for count, expected in ((3, [7, 7]), (1, [0, 0])):
        server = fl.FederatedServer(
            {"w": np.zeros(2), "n": np.array(0)}, num_rounds=2, rule=Model(), min_contributions=1
        )
        job = server.begin()
        job.start_round(0)
        for sent in contributions(round=0)[:count]:
            job.receive(sent.contributor, sent)
        assert job.aggregate() is (count > 1)
        assert job.weights["w"].tolist() == expected
        assert (job.end_round().error is None) is (count > 1)
        job.shut_down()


def test_out_of_a_rule_of_ones_own_may_not_be_an_input_and_inputs_cannot_be_changed() -> None:
    given = [{"w": np.array([1.0, 4.0])}, {"w": np.array([3.0, 2.0])}]
    with pytest.raises(fl.OutputError, match="overlaps an input"):
        fl.aggregate(given, rule=Largest(), out=given[0])
    assert given[0]["w"].tolist() == [1, 4]

    class Careless(Rule):
        def combine(self, given: Given) -> WeightDict:
            given.rows[0].arrays["w"][:] = 0
            return given.rows[0].arrays

    with pytest.raises(fl.AggregatorError, match="rule 'Careless': ValueError: assignment destination is read-only"):
        fl.aggregate(given, rule=Careless())
    assert given[0]["w"].tolist() == [1, 4]


def test_the_order_that_a_handler_gives_contributions_holds_and_what_is_refused_in_the_end_is_shown() -> None:
    class Reverses(fl.Handler):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def receive_contribution(self, ctx: fl.FLContext) -> None:
            if ctx[fl.ContextKey.REJECTION] is None:
                ctx[fl.ContextKey.CONTRIBUTIONS] = list(ctx[fl.ContextKey.CONTRIBUTIONS])[::-1]
            else:
                self.seen.append(ctx[fl.ContextKey.CONTRIBUTION].contributor)

        def before_aggregation(self, ctx: fl.FLContext) -> None:
            self.seen.append([one.contributor for one in ctx[fl.ContextKey.CONTRIBUTIONS]])

    handler = Reverses()
    model = {"w": np.zeros(2), "n": np.array(0)}
    server = fl.FederatedServer(
        model, num_rounds=1, handlers=[handler], on_bad_contribution="reject", min_contributions=1
    )
    with server.begin() as job:
        job.start_round(0)
        for sent in contributions(round=0):
            job.receive(sent.contributor, sent)
        job.receive("site-4", fl.Contribution("site-4", {"w": np.ones(2)}, 1, round=0))
        assert job.aggregate()
        report = job.end_round()
    assert handler.seen == ["site-4", ["site-3", "site-2", "site-1"]]
    assert report.total_weight == 5.0
