"""A job that is driven moment by moment, as by another stack; and servers that stream."""

import logging
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from federation import (
    AddingLearner,
    At,
    Recorder,
    WeightDict,
    clients_of,
    initial_weights,
    noise,
    replacing,
    values,
)
from reference import bits

import fed_learn as fl
from fed_learn.server import FederatedServer, Job, JobResult

Event, Key = fl.EventType, fl.ContextKey


def contribution(
    name: str, weights: WeightDict, weight: float = 1, *, round: int = 0, **fields: object
) -> fl.Contribution:
    return fl.Contribution(name, weights, weight, round=round, **fields)  # type: ignore[arg-type]


def drive(server: FederatedServer, sent: Mapping[str, WeightDict]) -> JobResult:
    """A whole job in which every client sends the same in each round."""
    with server.begin() as job:
        for name in sent:
            job.register(name)
        for number in range(server.settings.num_rounds or 0):
            job.start_round(number)
            for name in sent:
                job.send_model(name)
            for name, weights in sent.items():
                job.receive(name, contribution(name, weights, round=number, metrics={"initial_validation_metric": 0.5}))
            assert job.aggregate()
            job.end_round()
        job.begin_validation()
        for name in sent:
            job.send_model(name)
        for name in sent:
            score = {"initial_validation_metric": 0.75}
            job.receive_validation_result(name, fl.ValidationResult(name, "final", score))
        for name in sent:
            job.quit(name)
    return job.result()


def test_a_driven_job_fires_the_events_of_one_in_this_process_and_gives_its_result() -> None:
    step = {"a": 1.0, "b": 3.0}
    ours, driven = Recorder(), Recorder()
    learners = {name: AddingLearner(by, score=0.5) for name, by in step.items()}
    selection = fl.ModelSelectionHandler()
    expected = FederatedServer(initial_weights(), num_rounds=1, handlers=[selection, ours]).run(clients_of(learners))
    sent = {n: {v: np.asarray(a + by).astype(a.dtype) for v, a in initial_weights().items()} for n, by in step.items()}
    server = FederatedServer(initial_weights(), num_rounds=1, handlers=[fl.ModelSelectionHandler(), driven])
    result = drive(server, sent)
    cross_site = 3 * 2  # two local bests and the best of all, on two clients; nobody asked for these here
    in_process = ours.with_contributors()
    last = max(i for i, (event, _) in enumerate(in_process) if event == Event.RECEIVE_VALIDATION_RESULTS)
    assert driven.with_contributors() == in_process[: last + 1 - cross_site] + in_process[last + 1 :]
    assert bits(result.weights) == bits(expected.weights)
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (1, 0.75)  # the final model
    assert result.metrics == {"selection": 0.75}
    assert [report.accepted for report in result.reports] == [("a", "b")]


def test_what_goes_wrong_with_a_client_is_refused_or_ends_its_part() -> None:
    recorder = Recorder()
    server = FederatedServer(
        initial_weights(), num_rounds=1, min_contributions=1, on_bad_contribution="reject", handlers=[recorder]
    )
    with server.begin() as job:
        for name in "abcd":
            job.register(name)
        job.start_round(0)
        for name in "abcd":
            job.send_model(name)
        assert (
            job.receive("a", fl.DtypeError("a: 'w' is odd", contributor="a", name="w", dtype=None, expected=None))
            is None
        )
        assert job.receive("b", OSError("gone")) is None
        accepted = job.receive("c", contribution("c", initial_weights()))
        assert job.receive("c", contribution("c", initial_weights())) is None
        job.absent("d")
        assert list(job.clients) == ["a", "c", "d"]
        assert job.aggregate()
        report = job.end_round()
    assert accepted is not None
    assert accepted.contributor == "c"
    assert [(f.contributor, f.cause) for f in report.rejected] == [
        ("a", "DtypeError"),
        ("c", "DuplicateContributionError"),
    ]
    assert [(f.contributor, f.cause) for f in report.quits] == [("b", "OSError")]
    assert report.absent == ("d",)
    assert report.accepted == ("c",)
    assert recorder.with_contributors().count((Event.CLIENT_QUIT, "b")) == 1


def test_without_a_number_every_client_that_was_asked_must_contribute(caplog: pytest.LogCaptureFixture) -> None:
    job = FederatedServer(initial_weights(), num_rounds=1).begin()
    job.start_round(0)
    job.send_model("a")
    job.send_model("b")
    job.receive("a", contribution("a", noise(1)))
    assert not job.aggregate()
    report = job.end_round()
    assert bits(job.weights) == bits(initial_weights())
    with pytest.raises(
        fl.NothingAggregatedError, match="TooFewContributionsError once, the first: round 1: 1 accepted"
    ):
        job.finish()
    job.shut_down()
    assert isinstance(report.error, fl.TooFewContributionsError)
    assert "round 1: 1 accepted contributions, 2 required; the global model stands" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refused", [0, 1], ids=["all accepted", "one refused"])
def test_a_job_whose_handler_takes_out_every_contribution_ends_with_an_error_that_says_so(
    refused: int, stream: bool
) -> None:
    nothing = At(Event.BEFORE_AGGREGATION, lambda ctx: ctx.set_prop(Key.CONTRIBUTIONS, ()))
    server = FederatedServer(
        initial_weights(),
        num_rounds=2,
        min_contributions=1,
        on_bad_contribution="reject",
        handlers=[nothing],
        stream=stream,
    )
    job = server.begin()
    for number in range(2):
        job.start_round(number)
        for name in "ab":
            job.receive(name, contribution(name, noise(number), round=number))
        if refused and number:
            job.receive("c", contribution("c", noise(0), float("nan"), round=number))
        assert not job.aggregate()
        job.end_round()
    with pytest.raises(fl.NothingAggregatedError) as caught:
        job.finish()
    error = caught.value
    assert (error.cause, error.count, error.rounds) == ("TooFewContributionsError", 2, 2)
    assert str(error).endswith(
        "TooFewContributionsError 2 times, the first: round 1: 0 accepted contributions after a handler took out 2, "
        "1 required; the global model stands"
    )
    assert [len(report.rejected) for report in error.result.reports] == [0, refused]
    assert bits(error.result.weights) == bits(initial_weights())


def test_what_is_called_out_of_turn_says_what_comes_first() -> None:
    job = FederatedServer(initial_weights(), num_rounds=2).begin()
    calls: dict[str, Callable[[], object]] = {
        "receive": lambda: job.receive("a", contribution("a", noise(1))),
        "absent": lambda: job.absent("a"),
        "aggregate": job.aggregate,
        "end_round": job.end_round,
    }
    for what, call in calls.items():
        with pytest.raises(fl.OutOfTurnError, match=f"^{what}: start_round comes first$"):
            call()
    with pytest.raises(fl.OutOfTurnError, match="begin_validation comes first"):
        job.receive_validation_result("a", None)
    job.start_round(0)
    calls["receive"]()
    assert job.aggregate()
    job.end_round()
    model = bits(job.weights)
    for what, call in calls.items():
        with pytest.raises(fl.OutOfTurnError, match=f"^{what}: start_round comes first, for that of round 1 is over$"):
            call()
    assert bits(job.weights) == model


def test_contributions_that_would_be_lost_are_an_error_of_whoever_drives_the_job() -> None:
    job = FederatedServer({"w": np.zeros(1)}, num_rounds=2).begin()
    job.start_round(0)
    job.receive("a", contribution("a", {"w": np.ones(1)}))
    with pytest.raises(fl.OutOfTurnError, match=r"^end_round: aggregate comes first, for contributions to"):
        job.end_round()
    calls: dict[str, Callable[[], object]] = {
        "start_round": lambda: job.start_round(1),
        "begin_validation": job.begin_validation,
        "finish": job.finish,
        "the end of the job": lambda: job.__exit__(None, None, None),
    }
    for what, call in calls.items():
        text = f"^{what}: aggregate comes first, for contributions to round 1 have been accepted$"
        with pytest.raises(fl.OutOfTurnError, match=text):
            call()
    assert job.aggregate()
    with pytest.raises(fl.OutOfTurnError, match=r"^aggregate: round 1 is aggregated already$"):
        job.aggregate()
    with pytest.raises(fl.OutOfTurnError, match=r"^receive: round 1 is aggregated already$"):
        job.receive("b", contribution("b", {"w": np.full(1, 3.0)}))
    assert job.end_round().accepted == ("a",)
    job.start_round(1)
    job.receive("a", contribution("a", {"w": np.full(1, 5.0)}, round=1))
    job.break_off_round()
    job.start_round(1)
    job.receive("a", contribution("a", {"w": np.full(1, 7.0)}, round=1))
    assert job.aggregate()
    assert (job.weights["w"].tolist(), job.end_round().accepted) == ([7.0], ("a",))


def test_a_differences_round_cannot_be_added_twice() -> None:
    job = FederatedServer({"w": np.zeros(1)}, num_rounds=1, kind=fl.Kind.DIFF).begin()
    job.start_round(0)
    job.receive("a", contribution("a", {"w": np.ones(1)}, kind=fl.Kind.DIFF))
    assert job.aggregate()
    with pytest.raises(fl.OutOfTurnError, match="aggregated already"):
        job.aggregate()
    assert job.weights["w"].tolist() == [1.0]


def test_a_round_with_too_few_may_be_aggregated_once_enough_have_come() -> None:
    job = FederatedServer({"w": np.zeros(1)}, num_rounds=1, min_contributions=2).begin()
    job.start_round(0)
    job.receive("a", contribution("a", {"w": np.ones(1)}))
    assert not job.aggregate()
    job.receive("b", contribution("b", {"w": np.full(1, 3.0)}))
    assert job.aggregate()
    report = job.end_round()
    assert (report.error, report.accepted, job.weights["w"].tolist()) == (None, ("a", "b"), [2.0])
    job.finish()


def test_what_comes_after_an_attempt_with_too_few_is_not_lost_either() -> None:
    job = FederatedServer({"w": np.zeros(1)}, num_rounds=1, min_contributions=1).begin()
    job.start_round(0)
    assert not job.aggregate()
    job.receive("a", contribution("a", {"w": np.ones(1)}))
    with pytest.raises(fl.OutOfTurnError, match="aggregate comes first"):
        job.end_round()
    assert job.aggregate()
    assert job.end_round().accepted == ("a",)


def test_a_round_may_be_failed_for_a_reason_of_ones_own() -> None:
    job = FederatedServer({"w": np.zeros(1)}, num_rounds=1, min_contributions=1).begin()
    job.start_round(0)
    job.receive("a", contribution("a", {"w": np.ones(1)}))
    job.fail_round(RuntimeError("the lights went out"))
    assert str(job.end_round().error) == "the lights went out"
    with pytest.raises(fl.NothingAggregatedError, match="RuntimeError once, the first: the lights went out"):
        job.finish()
    assert job.weights["w"].tolist() == [0.0]


@pytest.mark.parametrize("stream", [False, True], ids=["kept", "stream"])
def test_what_was_refused_before_a_second_attempt_is_in_no_sum(stream: bool) -> None:
    def sent(name: str, value: float, *names: str) -> fl.Contribution:
        return contribution(name, {n: np.full(1, float(value)) for n in names})

    server = FederatedServer(
        {"w": np.zeros(1), "b": np.zeros(1)},
        num_rounds=1,
        min_contributions=3,
        on_bad_contribution="reject",
        stream=stream,
    )
    job = server.begin()
    job.start_round(0)
    for one in (sent("a", 100, "w"), sent("b", 5, "w", "b"), sent("d", 5, "w", "b")):
        job.receive(one.contributor, one)
    assert not job.aggregate()  # a is refused, and two are not enough
    assert [failure.contributor for failure in job.report.rejected] == ["a"]
    for name in "aceg":
        assert job.receive(name, sent(name, 3, "w")) is not None
    assert job.aggregate()
    assert (job.weights["w"].tolist(), job.end_round().accepted) == ([3.0], ("a", "c", "e", "g"))


def test_after_a_validation_between_rounds_the_context_holds_the_global_model() -> None:
    seen: list[float] = []

    class Looks(fl.Handler):
        def start_round(self, ctx: fl.FLContext) -> None:
            self.look(ctx)

        def before_aggregation(self, ctx: fl.FLContext) -> None:
            self.look(ctx)

        def look(self, ctx: fl.FLContext) -> None:
            assert ctx.model is not None
            assert ctx.model.weights is not None
            seen.append(float(ctx.model.weights["w"][0]))

    handlers = [Looks(), fl.ModelSelectionHandler()]
    with FederatedServer({"w": np.zeros(1)}, num_rounds=2, handlers=handlers).begin() as job:
        for number in range(2):
            job.start_round(number)
            score = {"initial_validation_metric": float(number)}
            job.receive("a", contribution("a", {"w": np.ones(1)}, round=number, metrics=score))
            job.aggregate()
            job.end_round()
            job.begin_validation("a", fl.weights.FrozenWeights({"w": np.full(1, 9.0)}))
            job.receive_validation_result("a", fl.ValidationResult("a", "a", {"initial_validation_metric": 0.5}))
    assert seen == [0.0, 0.0, 1.0, 1.0]
    best = job.result().best
    assert best is not None
    assert (best.round, best.metric, best.weights["w"].tolist()) == (1, 1.0, [1.0])


@pytest.mark.parametrize("refused", [False, True])
def test_a_job_that_is_told_what_something_else_aggregated_fires_the_events_of_one_that_aggregates(
    refused: bool,
) -> None:
    sent = [contribution("b", {"w": np.full(1, 3.0)}), contribution("a", {"w": np.full(1, 1.0)}, 3)]
    sent += [contribution("c", {"v": np.ones(1)})] if refused else []
    ours, told = Recorder(), Recorder()
    settings = {"num_rounds": 1, "min_contributions": 1, "on_bad_contribution": "reject"}
    model = {"w": np.zeros(1), **({"v": np.zeros(1)} if refused else {})}
    for recorder in (ours, told):
        with FederatedServer(model, handlers=[recorder], **settings).begin() as job:  # type: ignore[arg-type]
            job.start_round(0)
            if recorder is ours:
                for one in sent:
                    job.receive(one.contributor, one)
                assert job.aggregate()
            else:
                for one in sent:
                    job.note(one.contributor, one)
                if refused:
                    job.refuse("c", fl.NamesError("c: of another part", contributor="c"))
                assert [one.contributor for one in job.before_aggregation()] == ["a", "b"]
                job.note_aggregation(fl.RoundReport(0, ("a", "b"), total_weight=4.0))
                job.end_aggregation(fl.weights.FrozenWeights({**model, "w": np.full(1, 1.5)}))
            report = job.end_round()
        assert (report.accepted, report.total_weight, job.weights["w"].tolist()) == (("a", "b"), 4.0, [1.5])
        assert [failure.cause for failure in report.rejected] == ["NamesError"] * refused
    assert told.with_contributors() == ours.with_contributors()
    for ctx in (*ours.at(Event.RECEIVE_CONTRIBUTION)[-1:], *told.at(Event.RECEIVE_CONTRIBUTION)[-1:]):
        assert [one.contributor for one in ctx[Key.CONTRIBUTIONS]] == ["a", "b"]
        assert (ctx[Key.CONTRIBUTION].contributor, type(ctx[Key.REJECTION])) == (
            ("c", fl.NamesError) if refused else ("a", type(None))
        )


def test_weights_that_are_frozen_already_are_not_copied() -> None:
    from fed_learn.weights import FrozenWeights

    sent = FrozenWeights(noise(1))
    with FederatedServer(initial_weights(), num_rounds=1).begin() as job:
        job.start_round(0)
        accepted = job.receive("a", contribution("a", sent))
        copied = job.receive("b", contribution("b", noise(2)))
        job.break_off_round()
    assert accepted is not None
    assert copied is not None
    assert accepted.weights is not None
    assert all(np.shares_memory(accepted.weights[name], sent[name]) for name in sent)
    assert not any(array.flags.writeable for array in accepted.weights.values())


def test_handlers_are_shut_down_whatever_fails_in_a_driven_job() -> None:
    recorder = Recorder()
    with (
        pytest.raises(ZeroDivisionError),
        FederatedServer(initial_weights(), num_rounds=1, handlers=[recorder]).begin(),
    ):
        raise ZeroDivisionError
    assert recorder.events == [Event.STARTUP, Event.SHUTDOWN]


def test_a_handler_that_fails_to_shut_down_is_raised_with_the_result_or_noted_on_what_was_raised() -> None:
    def fail(_: fl.FLContext) -> None:
        raise RuntimeError("stuck")

    server = FederatedServer(initial_weights(), num_rounds=1, handlers=[At(Event.SHUTDOWN, fail)])
    with pytest.raises(fl.HandlerError) as caught:
        drive(server, {"a": noise(1)})
    assert isinstance(caught.value.result, JobResult)
    assert bits(caught.value.result.weights) == bits(noise(1))
    with pytest.raises(KeyError) as other, server.begin():
        raise KeyError
    assert "stuck" in other.value.__notes__[0]


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_of_a_round_is_kept_when_it_is_over(stream: bool) -> None:
    recorder = Recorder()
    server = FederatedServer({"w": np.zeros(100_000)}, num_rounds=1, handlers=[recorder], stream=stream)
    with server.begin() as job:
        job.start_round(0)
        tracemalloc.start()
        try:
            for name in "abc":
                job.receive(name, contribution(name, {"w": np.ones(100_000)}))
            job.aggregate()
            job.end_round()
            recorder.contexts.clear()
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept < 1.5 * 800_000  # the new global model
        assert [c.contributor for c in job.ctx[Key.CONTRIBUTIONS]] == ["a", "b", "c"]
        assert job.ctx[Key.CONTRIBUTION].contributor == "c"


def test_a_second_result_of_one_client_on_a_model_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with FederatedServer(initial_weights(), num_rounds=1).begin() as job:
        job.begin_validation()
        for score in (0.5, 1.0):
            job.receive_validation_result("a", fl.ValidationResult("a", "final", {"initial_validation_metric": score}))
        assert [r.metrics["initial_validation_metric"] for r in job.validation_results] == [0.5]
    assert "a: sent a result on 'final' already" in caplog.text


# Streaming


def streaming(**settings: object) -> FederatedServer:
    return FederatedServer(initial_weights(), num_rounds=1, stream=True, **settings)  # type: ignore[arg-type]


def round_of(job: Job, order: tuple[int, ...]) -> fl.RoundReport:
    job.start_round(0)
    for seed in order:
        job.receive(f"site-{seed}", contribution(f"site-{seed}", noise(seed), seed + 1))
    job.aggregate()
    return job.end_round()


def test_a_streaming_server_gives_the_mean_and_keeps_no_weights() -> None:
    recorder = Recorder()
    with streaming(handlers=[recorder]).begin() as job:
        round_of(job, (0, 1, 2))
    expected = fl.weighted_average([noise(seed) for seed in range(3)], [1, 2, 3])
    assert bits(job.weights) == bits(expected)
    for ctx in recorder.at(Event.RECEIVE_CONTRIBUTION) + recorder.at(Event.BEFORE_AGGREGATION):
        assert all(c.weights is None for c in ctx[Key.CONTRIBUTIONS])
    (ctx,) = recorder.at(Event.BEFORE_AGGREGATION)
    assert [(c.contributor, c.aggregation_weight) for c in ctx[Key.CONTRIBUTIONS]] == [
        ("site-0", 1),
        ("site-1", 2),
        ("site-2", 3),
    ]


def test_exact_streams_give_the_same_bits_in_any_order() -> None:
    results = []
    for order in permutations(range(4)):
        with streaming(exact=True).begin() as job:
            round_of(job, order)
        results.append(bits(job.weights))
    with FederatedServer(initial_weights(), num_rounds=1, exact=True).begin() as job:
        round_of(job, (0, 1, 2, 3))
    assert all(result == bits(job.weights) for result in results)


def test_a_streaming_server_takes_differences() -> None:
    server = FederatedServer(noise(7), num_rounds=1, stream=True, kind=fl.Kind.DIFF)
    result = server.run(clients_of({"a": AddingLearner(1), "b": AddingLearner(3)}, kind=fl.Kind.DIFF))
    batch = FederatedServer(noise(7), num_rounds=1, kind=fl.Kind.DIFF)
    expected = batch.run(clients_of({"a": AddingLearner(1), "b": AddingLearner(3)}, kind=fl.Kind.DIFF))
    assert bits(result.weights) == bits(expected.weights)


def test_what_a_streaming_server_refuses_leaves_no_trace() -> None:
    bad = noise(9)
    bad["b"][1] = np.nan
    with streaming(on_bad_contribution="reject", min_contributions=2).begin() as job:
        job.start_round(0)
        job.receive("site-0", contribution("site-0", noise(0)))
        assert job.receive("site-9", contribution("site-9", bad)) is None
        assert job.receive("site-0", contribution("site-0", noise(0))) is None
        assert job.receive("site-8", contribution("site-8", noise(8), round=3)) is None
        job.receive("site-1", contribution("site-1", noise(1)))
        assert job.aggregate()
        report = job.end_round()
    assert bits(job.weights) == bits(fl.weighted_average([noise(0), noise(1)], [1, 1]))
    assert [f.cause for f in report.rejected] == ["NonFiniteError", "DuplicateContributionError", "RoundError"]


def test_a_handler_cannot_take_out_what_has_been_added_up() -> None:
    take = At(Event.BEFORE_AGGREGATION, lambda ctx: ctx.set_prop(Key.CONTRIBUTIONS, ctx[Key.CONTRIBUTIONS][:1]))
    with (
        pytest.raises(ValueError, match="they are added up already"),
        streaming(handlers=[take], min_contributions=1).begin() as job,
    ):
        round_of(job, (0, 1))


def test_a_handler_cannot_weigh_anew_what_has_been_added_up() -> None:
    def twice(ctx: fl.FLContext) -> None:
        first, second = ctx[Key.CONTRIBUTIONS]
        ctx[Key.CONTRIBUTIONS] = (first, replace(second, aggregation_weight=2 * second.aggregation_weight))

    with (
        pytest.raises(ValueError, match="they are added up already"),
        streaming(handlers=[At(Event.BEFORE_AGGREGATION, twice)]).begin() as job,
    ):
        round_of(job, (0, 1))


def test_a_handler_may_add_to_what_a_streaming_server_noted() -> None:
    def score(ctx: fl.FLContext) -> None:
        ctx[Key.CONTRIBUTIONS] = tuple(replace(c, metrics={"score": 1.0}) for c in ctx[Key.CONTRIBUTIONS])

    with streaming(handlers=[At(Event.BEFORE_AGGREGATION, score)]).begin() as job:
        round_of(job, (0, 1))
    assert bits(job.weights) == bits(fl.weighted_average([noise(0), noise(1)], [1, 2]))


def test_sums_that_leave_their_range_fail_the_round_and_the_model_stands(caplog: pytest.LogCaptureFixture) -> None:
    largest = {"w": np.full(2, np.finfo(np.float64).max)}
    job = FederatedServer({"w": np.zeros(2)}, num_rounds=1, stream=True).begin()
    job.start_round(0)
    for name in "ab":
        job.receive(name, contribution(name, largest, 4))
    with caplog.at_level(logging.ERROR):
        assert not job.aggregate()
    report = job.end_round()
    with pytest.raises(fl.NothingAggregatedError, match="SumOverflowError"):
        job.finish()
    assert isinstance(report.error, fl.SumOverflowError)
    assert job.weights["w"].tolist() == [0.0, 0.0]
    assert "the global model stands" in caplog.text


def test_a_model_that_a_handler_sets_goes_on_in_a_stream() -> None:
    with streaming(handlers=[At(Event.START_ROUND, replacing(10))], min_contributions=1).begin() as job:
        job.start_round(0)
        assert values(job.weights) == (10.0, 10.0, 10.0)
        job.receive("a", contribution("a", noise(1)))
        assert job.aggregate()
    assert bits(job.weights) == bits(noise(1))
