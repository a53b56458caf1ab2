"""A job that goes on in another process: the same bytes as one that was never stopped, and nothing forgotten."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn.client.fed_privacy import LaplacianProtocol
from fed_learn.durable import StateStore, encoded
from fed_learn.handlers import CheckpointHandler, EarlyStoppingHandler, JsonLinesHandler
from fed_learn.handlers.json_lines import jsonable
from fed_learn.weights import WeightDict

pytestmark = pytest.mark.quick

ROUNDS = 6
NAMES = ("site-1", "site-2", "site-3")


class Walker(fl.Learner):
    """Adds what it draws; remembers how far it has come; may fail, or sit a round out."""

    def __init__(self, seed: int, fails_in: int | None = None, sits_out: int | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.far = 0.0
        self.fails_in = fails_in
        self.sits_out = sits_out

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> Any:
        number = ctx[fl.ContextKey.ROUND]
        if number == self.fails_in:
            raise RuntimeError("out of memory")
        if number == self.sits_out:
            return None
        step = self.rng.normal(size=weights["w"].shape)
        self.far += float(abs(step).sum())
        return {"w": weights["w"] + step, "steps": weights["steps"] + 1}, 10, {"far": self.far}

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> float:
        return -float(abs(weights["w"]).sum())

    def get_state(self) -> Any:
        return {"rng": self.rng.bit_generator.state, "far": self.far}

    def set_state(self, state: Any) -> None:
        self.rng.bit_generator.state, self.far = state["rng"], state["far"]


class Counting(fl.Handler):
    """Counts events, and keeps its counts; binds a value and an array of its own in the context."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        if event == fl.EventType.STARTUP:
            self.counts = {}
        self.counts[event] = self.counts.get(event, 0) + 1
        if event == fl.EventType.END_ROUND:
            ctx.set_prop("mine", {"last": ctx[fl.ContextKey.ROUND], "history": np.arange(self.counts[event])})

    def get_state(self) -> Any:
        return dict(self.counts)

    def set_state(self, state: Any) -> None:
        self.counts = dict(state)


def clients(count: int = 3, **options: Any) -> list[fl.FederatedClient]:
    return [
        fl.FederatedClient(
            name,
            Walker(number, **(options if number == 0 else {})),
            handlers=[Counting()],
            filters=[LaplacianProtocol(fraction=2.0, epsilon=1e9, gamma=10.0, tau=0.0, seed=number)],
        )
        for number, name in enumerate(NAMES[:count])
    ]


def handlers(folder: Path, *more: fl.Handler) -> list[fl.Handler]:
    return [
        fl.ModelSelectionHandler(mode="max"),
        Counting(),
        *more,
        JsonLinesHandler(folder / "job.jsonl", times=False),
        CheckpointHandler(folder),
    ]


INITIAL: WeightDict = {"w": np.full(1000, 5.0), "steps": np.array(0)}


def server(folder: Path, rounds: int = ROUNDS, **options: Any) -> fl.FederatedServer:
    given = {"handlers": handlers(folder), "on_bad_contribution": "reject", "min_contributions": 1, **options}
    return fl.FederatedServer(INITIAL, num_rounds=rounds, durable=folder / "state", **given)


def resumed(folder: Path, rounds: int | None = ROUNDS, **options: Any) -> fl.FederatedServer:
    return fl.FederatedServer.resume(folder / "state", num_rounds=rounds, **{"handlers": handlers(folder), **options})


def told(result: fl.JobResult, server: fl.FederatedServer) -> str:
    """All that is told of a job, and its models, as text."""
    counting = next(handler for handler in server.handlers if isinstance(handler, Counting))
    best = result.best
    parts = {
        "weights": result.weights,
        "best": None if best is None else [best.round, best.metric, best.metric_name, best.weights],
        "reports": [report.as_dict(times=False) for report in result.reports],
        "metrics": dict(result.metrics),
        "cross_site": {model: dict(row) for model, row in result.cross_site.items()},
        "quits": [quit.as_dict() for quit in result.quits],
        "failures": [str(failure) for failure in result.handler_failures],
        "stop": result.stop_reason,
        "counts": {name: count for name, count in counting.counts.items() if name != fl.EventType.STARTUP},
        "mine": server.ctx.get_prop("mine"),
    }
    assert jsonable({"reports": parts["reports"]})
    return encoded(parts).text


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"stream": True}, {"kind": "diff"}], ids=str)
@pytest.mark.parametrize("at", [0, 1, 3, ROUNDS])
def test_a_job_that_is_resumed_after_any_round_ends_with_the_same(
    at: int, options: dict[str, Any], tmp_path: Path
) -> None:
    def own_clients() -> list[fl.FederatedClient]:
        made = clients(fails_in=2)
        return [fl.FederatedClient(c.name, c.learner, handlers=c.handlers, filters=c.filters, kind=kind) for c in made]

    kind = fl.Kind(options.get("kind", "full"))
    (tmp_path / "whole").mkdir()
    whole = server(tmp_path / "whole", **options)
    expected = told(whole.run(own_clients()), whole)
    folder = tmp_path / "parts"
    folder.mkdir()

    class Killed(BaseException):
        pass

    class Killer(fl.Handler):
        def start_round(self, ctx: fl.FLContext) -> None:
            if ctx[fl.ContextKey.ROUND] == at:
                raise Killed

        def receive_validation_results(self, ctx: fl.FLContext) -> None:
            raise Killed

    with pytest.raises(Killed):
        server(folder, handlers=[*handlers(folder), Killer()], **options).run(own_clients())
    assert StateStore(folder / "state").numbers()[-1] == at
    again = resumed(folder)
    assert told(again.run(own_clients()), again) == expected
    assert files(folder) == files(tmp_path / "whole")


def test_more_rounds_of_a_job_that_is_done_are_those_of_a_longer_job(tmp_path: Path) -> None:
    for name in ("long", "short"):
        (tmp_path / name).mkdir()
    long = server(tmp_path / "long")
    expected = told(long.run(clients(sits_out=3)), long)
    server(tmp_path / "short", rounds=2).run(clients(sits_out=3))
    resumed(tmp_path / "short", rounds=4).run(clients(sits_out=3))
    again = resumed(tmp_path / "short", rounds=ROUNDS)
    result = told(again.run(clients(sits_out=3)), again)
    assert result == expected


def test_a_loop_of_ones_own_goes_on(tmp_path: Path) -> None:
    def rounds(job: fl.Job, until: int) -> None:
        for number in range(job.next_round, until):
            job.start_round(number)
            for name in NAMES:
                value = job.weights["w"] + number
                steps = job.weights["steps"] + 1
                job.receive(name, fl.Contribution(name, {"w": value, "steps": steps}, 1, round=number))
            job.aggregate()
            job.end_round()

    with server(tmp_path, handlers=[Counting()]).begin() as job:
        assert (job.next_round, job.resumed) == (0, False)
        for name in NAMES:
            job.register(name)
        rounds(job, 2)
    counting = Counting()
    with resumed(tmp_path, handlers=[counting]).begin() as job:
        assert (job.next_round, job.resumed, len(job.reports)) == (2, True, 2)
        assert job.weights["w"][0] == 5 + 0 + 1
        for name in (*NAMES, "late"):
            job.register(name)
        rounds(job, ROUNDS)
        assert counting.counts[fl.EventType.CLIENT_REGISTER] == 4, "those that came back had registered before"
        assert sorted(job.clients) == sorted((*NAMES, "late"))
        assert job.weights["w"][0] == 5 + sum(range(ROUNDS))


def test_a_folder_with_a_job_is_no_place_for_another(tmp_path: Path) -> None:
    server(tmp_path, rounds=2).run(clients())
    before = files(tmp_path), files(tmp_path / "state")
    with pytest.raises(fl.StateExistsError, match=r"holds the state of a job after 2 rounds: FederatedServer\.resume"):
        server(tmp_path, rounds=2).run(clients())
    with pytest.raises(FileExistsError):
        server(tmp_path, rounds=2).begin()
    assert (files(tmp_path), files(tmp_path / "state")) == before


def test_two_jobs_cannot_write_one_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with server(tmp_path).begin(), pytest.raises(fl.StateExistsError):
        server(tmp_path).begin()
    with server(tmp_path / "other").begin():
        pass
    assert not list((tmp_path / "state").glob("*.lock"))


def test_a_client_that_left_before_stays_out_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server(tmp_path, rounds=3).run(clients(fails_in=1))
    result = resumed(tmp_path).run(clients())
    assert "site-1 left the job before it was resumed, and stays out" in caplog.messages
    assert [quit.contributor for quit in result.quits] == ["site-1"]
    assert [report.accepted for report in result.reports[3:]] == [("site-2", "site-3")] * 3


def test_an_early_stop_holds(tmp_path: Path) -> None:
    def stopping(folder: Path) -> list[fl.Handler]:
        return handlers(folder, EarlyStoppingHandler(patience=1))

    first = server(tmp_path, rounds=20, handlers=stopping(tmp_path)).run(clients())
    assert first.stop_reason is not None
    again = resumed(tmp_path, rounds=30, handlers=stopping(tmp_path)).run(clients())
    assert (again.stop_reason, len(again.reports)) == (first.stop_reason, len(first.reports))


def test_what_no_longer_fits_is_refused_by_name(tmp_path: Path) -> None:
    server(tmp_path, rounds=2).run(clients())
    with pytest.raises(fl.StateError, match=r"holds the state of 'test_resume\.Counting'"):
        resumed(tmp_path, handlers=[fl.ModelSelectionHandler(mode="max")]).run(clients())
    with pytest.raises(ValueError, match="num_rounds is 1, and 2 rounds of the job are over"):
        resumed(tmp_path, rounds=1)
    others = [fl.FederatedClient(name, _Forgetful()) for name in NAMES]
    with pytest.raises(fl.StateError, match=r"the state of site-1 holds the state of 'test_resume\.Walker'"):
        resumed(tmp_path, rounds=2).run(others)


class _Forgetful(fl.Learner):
    def train(self, weights: WeightDict, ctx: fl.FLContext) -> Any:
        return dict(weights), 1

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> float:
        return 0.0


class _Largest(fl.rules.Rule):
    name = "largest"

    def combine(self, given: Any) -> WeightDict:
        return {name: np.max([row.arrays[name] for row in given.rows], axis=0) for name in given.schema}


def test_code_that_is_no_part_of_the_state_has_to_be_given_again(tmp_path: Path) -> None:
    whole = server(tmp_path / "whole", rounds=4, handlers=[Counting()], rule=_Largest())
    expected = told(whole.run(clients()), whole)
    server(tmp_path, rounds=2, handlers=[Counting()], rule=_Largest()).run(clients())
    with pytest.raises(ValueError, match="combines by 'largest': give it as rule= or aggregator="):
        resumed(tmp_path, handlers=[Counting()])
    again = resumed(tmp_path, rounds=4, handlers=[Counting()], rule=_Largest())
    assert told(again.run(clients()), again) == expected


class _Unable(fl.Handler):
    def __init__(self, state: Any) -> None:
        self.state = state

    def get_state(self) -> Any:
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (RuntimeError("no"), "test_resume._Unable could not hand over its state: RuntimeError: no"),
        ({"model": object()}, r"state\.handlers\[4\]\[1\]\.model is an object, which cannot be kept"),
    ],
)
@pytest.mark.parametrize("on_handler_error", ["raise", "log"])
def test_a_state_that_cannot_be_kept_is_no_secret(
    on_handler_error: str, state: Any, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain = [*handlers(tmp_path), _Unable(state)]
    job = server(tmp_path, rounds=2, handlers=chain, on_handler_error=on_handler_error)
    if on_handler_error == "raise":
        with pytest.raises(fl.StateError, match=text):
            job.run(clients())
    else:
        result = job.run(clients())
        assert len(result.reports) == 2
        assert str(result.handler_failures[0]).startswith("fed_learn.durable.StateStore")
    assert any("the state after 0 rounds is not kept" in message for message in caplog.messages)


def test_what_a_handler_binds_and_cannot_be_kept_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Binder(fl.Handler):
        def end_round(self, ctx: fl.FLContext) -> None:
            ctx.set_prop("socket", object())

    server(tmp_path, rounds=3, handlers=[Binder()]).run(clients())
    named = [message for message in caplog.messages if "'socket' in the context is an object" in message]
    assert len(named) == 1


def test_a_damaged_newest_state_is_said_and_the_one_before_gives_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "whole").mkdir()
    whole = server(tmp_path / "whole")
    expected = told(whole.run(clients()), whole)
    server(tmp_path, rounds=4).run(clients())
    newest = tmp_path / "state" / "state-00000004.json"
    newest.write_bytes(newest.read_bytes()[:-30])
    with caplog.at_level(logging.ERROR):
        again = resumed(tmp_path)
    assert any("state-00000004.json is damaged" in m and "after 3 rounds is taken" in m for m in caplog.messages)
    assert told(again.run(clients()), again) == expected


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    fl.FederatedServer(INITIAL, num_rounds=1).run(clients())
    assert os.listdir(tmp_path) == []


def test_what_was_told_of_parts_and_masks_is_no_obstacle_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: WeightDict = {"a": np.zeros(2), "b": np.zeros(2), "mask": np.array([0.0, -np.inf])}

    def rounds(server: fl.FederatedServer, numbers: range) -> None:
        with server.begin() as job:
            for number in numbers:
                job.start_round(number)
                for name in ("x", "y", "z"):
                    part = {key: model[key] for key in (("a", "mask", "b") if name == "z" else ("a", "mask"))}
                    assert job.receive(name, fl.Contribution(name, part, 1, round=number)) is not None
                assert job.aggregate()
                job.end_round()

    rounds(fl.FederatedServer(model, num_rounds=4, partial="average", durable=tmp_path), range(2))
    rounds(fl.FederatedServer.resume(tmp_path), range(2, 4))
    for said in ("sent by one of 3 contributions alone", "not finite in the global model"):
        assert caplog.text.count(said) == 1


def test_the_log_and_the_models_of_another_job_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    server(one, rounds=2).run(clients())
    for name in ("job.jsonl", "global.safetensors", "best.safetensors"):
        (one / name).unlink()
    job_b = handlers(one)
    fl.FederatedServer(INITIAL, num_rounds=3, handlers=job_b, durable=other).run(clients(2))
    before = files(one)
    resumed(one, rounds=4).run(clients())
    after = files(one)
    assert {name: after[f"{name}.1"] for name in before} == before
    assert "does not hold the rounds that this job wrote there: a new file begins" in caplog.text


def test_a_server_that_read_a_state_which_is_not_the_newest_any_more_changes_nothing(tmp_path: Path) -> None:
    server(tmp_path, rounds=2).run(clients())
    late = resumed(tmp_path, rounds=5)
    resumed(tmp_path, rounds=4).run(clients())
    with pytest.raises(fl.StateError, match="the job has gone on since its state was read: resume it again"):
        late.run(clients())
    assert StateStore(tmp_path / "state").numbers() == [3, 4]


def test_a_client_that_is_not_given_again_has_left_by_name(tmp_path: Path) -> None:
    server(tmp_path, rounds=2, min_contributions=None).run(clients())
    with pytest.raises(
        fl.TooFewContributionsError, match=r"2 clients are left, 3 required: site-3 left .*was not given"
    ):
        resumed(tmp_path, rounds=3).run(clients(2))
    result = resumed(tmp_path, rounds=3, min_contributions=2).run(clients(2))
    assert [report.accepted for report in result.reports] == [NAMES, NAMES, NAMES[:2]]
    assert [quit.contributor for quit in result.quits] == ["site-3"]


def test_the_same_objects_go_on_as_new_ones_would(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = server(tmp_path / "whole", rounds=2)
    expected = told(whole.run(clients()), whole)

    class Stops(fl.Handler):
        def end_round(self, ctx: fl.FLContext) -> None:
            raise KeyboardInterrupt

    (tmp_path / "parts").mkdir()
    own = clients()
    with pytest.raises(KeyboardInterrupt):
        server(tmp_path / "parts", rounds=2, handlers=[*handlers(tmp_path / "parts"), Stops()]).run(own)
    again = resumed(tmp_path / "parts", rounds=2)
    assert told(again.run(own), again) == expected


def test_arrays_that_a_handler_binds_can_be_changed_after_a_resume(tmp_path: Path) -> None:
    class Sums(fl.Handler):
        def end_round(self, ctx: fl.FLContext) -> None:
            if "sums" not in ctx:
                ctx.set_prop("sums", np.zeros(3000))
                ctx.set_prop("few", np.zeros(2))
            ctx["sums"] += 1
            ctx["few"] += 1

    server(tmp_path, rounds=2, handlers=[Sums()]).run(clients())
    again = resumed(tmp_path, rounds=4, handlers=[Sums()])
    again.run(clients())
    assert (again.ctx["sums"][0], again.ctx["few"].tolist()) == (4, [4, 4])


class _Heavy(fl.rules.Rule):
    """The mean, with momentum."""

    name = "heavy"

    def __init__(self) -> None:
        self.velocity: Any = None

    def combine(self, given: Any) -> WeightDict:
        mean = {name: np.mean([row.arrays[name] for row in given.rows], axis=0) for name in given.schema}
        step = mean["w"] - given.model["w"]
        self.velocity = step if self.velocity is None else 0.5 * self.velocity + step
        return {**mean, "w": given.model["w"] + self.velocity}

    def get_state(self) -> Any:
        return {"velocity": self.velocity}

    def set_state(self, state: Any) -> None:
        self.velocity = state["velocity"]


def test_a_rule_and_an_evaluator_with_a_state_go_on(tmp_path: Path) -> None:
    class Counts(fl.ModelEvaluator):
        def __init__(self) -> None:
            self.count = 0

        def evaluate(self, ctx: fl.FLContext) -> None:
            self.count += 1

        def get_metric(self) -> float:
            return float(self.count)

        def get_state(self) -> Any:
            return self.count

        def set_state(self, state: Any) -> None:
            self.count = state

    def chain() -> list[Any]:
        return [fl.ServerValidationHandler(Counts(), 1), Counting()]

    whole = server(tmp_path / "whole", rounds=4, handlers=chain(), rule=_Heavy())
    expected = told(whole.run(clients()), whole)
    server(tmp_path / "parts", rounds=4, handlers=[*chain(), _Ends(2)], rule=_Heavy())
    with pytest.raises(KeyboardInterrupt):
        server(tmp_path / "parts", rounds=4, handlers=[*chain(), _Ends(2)], rule=_Heavy()).run(clients())
    again = resumed(tmp_path / "parts", rounds=4, handlers=chain(), rule=_Heavy())
    assert told(again.run(clients()), again) == expected


class _Ends(fl.Handler):
    def __init__(self, number: int) -> None:
        self.number = number

    def start_round(self, ctx: fl.FLContext) -> None:
        if ctx[fl.ContextKey.ROUND] == self.number:
            raise KeyboardInterrupt


@pytest.mark.parametrize("key", ["settings", "reports", "quits", "clients", "model", "handlers", "context"])
@pytest.mark.parametrize("value", [None, [1], {"handlers": []}, "x"], ids=str)
def test_a_state_that_somebody_made_up_is_refused_in_one_way(key: str, value: Any, tmp_path: Path) -> None:
    server(tmp_path, rounds=1, handlers=[]).run(clients())
    with StateStore(tmp_path / "state") as store:
        _, state = store.load()
        store.save(1, {**state, key: value})
    if key == "handlers" and value == [1]:
        with pytest.raises(fl.StateError):
            resumed(tmp_path, handlers=[]).run(clients())
        return
    if (key, value) in [("context", {"handlers": []}), ("model", {"handlers": []})]:
        return  # a key of somebody's own; a model is compared with those of contributions
    with pytest.raises(fl.StateError, match=r"holds no state of a job|other settings"):
        resumed(tmp_path, handlers=[])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_that_ends_after_a_kill_at_its_end_has_its_global_model(overwrite: bool, tmp_path: Path) -> None:
    def chain(*more: fl.Handler) -> list[fl.Handler]:
        return [*more, fl.ModelSelectionHandler(mode="max"), CheckpointHandler(tmp_path, overwrite=overwrite)]

    class Ends(fl.Handler):
        def shutdown(self, ctx: fl.FLContext) -> None:
            raise KeyboardInterrupt  # after the handlers behind it, one of which has written the best model

    with pytest.raises(KeyboardInterrupt):
        server(tmp_path, rounds=2, handlers=chain(Ends())).run(clients())
    written = files(tmp_path)
    best = tmp_path / "best.safetensors"
    os.utime(best, ns=(1, 1))  # as where it was written after the state
    resumed(tmp_path, rounds=2, handlers=chain()).run(clients())
    after = files(tmp_path)
    assert {name: after[name] for name in written} == written
    assert sorted(after) == sorted([*written, *([] if overwrite else [f"{name}.1" for name in written])])
