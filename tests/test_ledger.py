"""The ledger of a job: whatever is changed in it, or in what it tells of, is found and named."""

import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_and_resume import COMMAND, contents
from test_resume import INITIAL, clients, server

import fed_learn as fl
from fed_learn.durable import digest
from fed_learn.durable.ledger import Ledger, read_ledger
from fed_learn.durable.weight_file import read_weights
from fed_learn.server.job_ledger import KEPT, NAME
from fed_learn.server.verification import verify
from fed_learn.weights import WeightDict

pytestmark = pytest.mark.quick


def job(folder: Path, **options: Any) -> fl.JobResult:
    given = {"handlers": [], "ledger": True, "keep_contributions": True, **options}
    made = server(folder, rounds=3, **given)
    kind = fl.Kind(options.get("kind", "full"))
    own = [fl.FederatedClient(c.name, c.learner, kind=kind) for c in clients(fails_in=1)]
    return made.run(own)


def lines(folder: Path) -> list[str]:
    return (folder / "state" / NAME).read_text().splitlines()


@pytest.mark.parametrize(
    "options",
    [{}, {"exact": True}, {"kind": "diff"}, {"stream": True, "exact": True}, {"policies": {"steps": "max"}}],
    ids=str,
)
def test_every_round_of_a_job_is_made_again_with_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    result = job(tmp_path, **options)
    found = verify(tmp_path / "state")
    assert (found.rounds, found.made_again, found.not_kept, found.failed) == (3, (0, 1, 2), (), ())
    entries = list(read_ledger(tmp_path / "state" / NAME))
    assert (
        entries[0]["model"] == entries[1]["model_before"] == digest(fl.FederatedServer(INITIAL, num_rounds=1).weights)
    )
    assert entries[-1]["model_after"] == digest(result.weights)
    assert [one["contributor"] for one in entries[2]["contributions"]] == ["site-2", "site-3"]
    assert entries[-1]["digest"] == found.head


def test_a_stream_in_the_order_of_arrival_and_rounds_that_failed_are_told_apart(tmp_path: Path) -> None:
    job(tmp_path / "stream", stream=True)
    assert verify(tmp_path / "stream" / "state").not_kept == (0, 1, 2)
    folder = tmp_path / "failed"
    one = fl.FederatedServer(INITIAL, num_rounds=1, durable=folder, ledger=True, min_contributions=2).begin()
    one.start_round(0)
    one.receive("a", fl.Contribution("a", INITIAL, 1, round=0))
    assert not one.aggregate()
    one.end_round()
    one.shut_down()
    assert verify(folder).failed == (0,)


def test_a_byte_that_is_changed_anywhere_is_found_and_named(tmp_path: Path) -> None:
    job(tmp_path)
    state = tmp_path / "state"
    whole = (state / NAME).read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(whole)), 300):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        (state / NAME).write_bytes(changed)
        with pytest.raises(fl.LedgerError, match=r"entry \d|does not end with"):
            verify(state)
    (state / NAME).write_bytes(whole)
    for path in sorted((state / KEPT).iterdir()):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        with pytest.raises(fl.LedgerError, match=r"round \d.*was changed"):
            verify(state)
        data[-3] ^= 1
        path.write_bytes(data)
    assert verify(state).made_again == (0, 1, 2)


@pytest.mark.parametrize("change", ["taken out", "doubled", "exchanged", "cut off", "put in"])
def test_entries_that_are_moved_are_found(change: str, tmp_path: Path) -> None:
    job(tmp_path)
    one, two, three, four = lines(tmp_path)
    moved: dict[str, Sequence[str]] = {
        "taken out": [one, two, four],
        "doubled": [one, two, two, three, four],
        "exchanged": [one, three, two, four],
        "cut off": [one, two, three],
        "put in": [one, two, three, four, two],
    }
    (tmp_path / "state" / NAME).write_text("".join(line + "\n" for line in moved[change]))
    with pytest.raises(fl.LedgerError, match=r"does not follow|does not end with the entry"):
        verify(tmp_path / "state")


def test_a_ledger_that_was_written_anew_with_right_digests_does_not_fit_what_it_tells_of(tmp_path: Path) -> None:
    job(tmp_path)
    entries = [
        {k: v for k, v in e.items() if k not in ("digest", "previous")} for e in read_ledger(tmp_path / "state" / NAME)
    ]
    entries[2]["contributions"][0]["aggregation_weight"] = 1000.0
    (tmp_path / "state" / NAME).unlink()
    ledger = Ledger(tmp_path / "state" / NAME)
    for entry in entries:
        ledger.append(entry)
    with pytest.raises(fl.LedgerError, match="round 2, made again, gives another model than the ledger says"):
        verify(tmp_path / "state")


def test_a_resumed_job_writes_the_ledger_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    job(tmp_path / "whole")
    job(tmp_path / "parts")
    state = tmp_path / "parts" / "state"
    (state / "state-00000003.json").unlink()
    fl.FederatedServer.resume(state).run([fl.FederatedClient(c.name, c.learner) for c in clients(fails_in=1)])
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "state" / NAME, state / NAME)
    (state / NAME).write_text("\n".join(lines(tmp_path / "whole")[:2]))
    with pytest.raises(fl.LedgerError, match="bytes, and had"):
        fl.FederatedServer.resume(state, num_rounds=4).run([fl.FederatedClient(c.name, c.learner) for c in clients()])


def test_a_handler_that_replaces_contributions_or_the_model_is_in_the_ledger(tmp_path: Path) -> None:
    class Replaces(fl.Handler):
        def before_aggregation(self, ctx: fl.FLContext) -> None:
            first, *_ = ctx[fl.ContextKey.CONTRIBUTIONS]
            halved: WeightDict = {**first.weights, "w": first.weights["w"] / 2}
            ctx[fl.ContextKey.CONTRIBUTIONS] = [fl.Contribution(first.contributor, halved, 5, round=first.round)]

        def after_aggregation(self, ctx: fl.FLContext) -> None:
            assert ctx.model is not None
            assert ctx.model.weights is not None
            ctx.set_model(fl.ModelData({**ctx.model.weights, "w": ctx.model.weights["w"] + 1}))

    job(tmp_path, handlers=[Replaces()])
    assert verify(tmp_path / "state").made_again == (0, 1, 2)
    entry = list(read_ledger(tmp_path / "state" / NAME))[1]
    assert entry["aggregated"] != entry["model_after"]
    assert [(one["contributor"], one["aggregation_weight"]) for one in entry["contributions"]] == [("site-1", 5)]


@pytest.mark.parametrize("options", [{"ledger": True}, {"keep_contributions": True}], ids=str)
def test_a_ledger_needs_a_folder(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need durable=, the folder in which they are kept"):
        fl.FederatedServer(INITIAL, num_rounds=1, **options)


@pytest.mark.not_quick
def test_the_command_writes_and_verifies_a_ledger(tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        command = [*COMMAND[:-1], *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    small = ("simulate", "--clients", 2, "--local-epochs", 1)
    out, other = tmp_path / "out", tmp_path / "other"
    assert run(*small, "--rounds", 3, "--keep-contributions", "--out", out).returncode == 0
    assert run(*small, "--rounds", 2, "--keep-contributions", "--out", other).returncode == 0
    assert run("simulate", "--resume", "--rounds", 3, "--out", other).returncode == 0
    assert contents(out) == contents(other)
    done = run("verify", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 rounds were made again from their contributions, with the same bits." in done.stdout
    assert json.loads(run("verify", "--json", out / "state").stdout)["made_again"] == [0, 1, 2]
    kept = next((out / "state" / KEPT).iterdir())
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    done = run("verify", out)
    assert done.returncode == 1
    assert done.stderr.startswith("fed-learn: round ")
    assert run("verify", tmp_path).returncode == 2


def test_numbers_of_all_kinds_are_in_the_ledger_as_they_were(tmp_path: Path) -> None:
    with fl.FederatedServer(
        INITIAL, num_rounds=1, durable=tmp_path, ledger=True, keep_contributions=True
    ).begin() as one:
        one.start_round(0)
        weights: dict[str, Any] = {"a": np.float32(0.1), "b": np.int64(7), "c": 1e-300}
        for name, weight in weights.items():
            one.receive(name, fl.Contribution(name, INITIAL, weight, round=0, n_iter=3))
        assert one.aggregate()
        one.end_round()
    assert verify(tmp_path).made_again == (0,)


def test_what_was_kept_and_is_not_there_any_more_is_missed(tmp_path: Path) -> None:
    job(tmp_path)
    state = tmp_path / "state"
    one = sorted((state / KEPT).iterdir())[0]
    one.rename(tmp_path / "aside")
    with pytest.raises(fl.LedgerError, match=r"round \d: .*, which was kept, is not there"):
        verify(state)
    (tmp_path / "aside").rename(one)
    (state / KEPT).rename(tmp_path / "contributions")
    with pytest.raises(fl.LedgerError, match="in which the job kept its contributions, is not there"):
        verify(state)
    assert verify(state, tmp_path / "contributions").made_again == (0, 1, 2)


def test_a_damaged_state_is_named_and_not_the_ledger(tmp_path: Path) -> None:
    job(tmp_path)
    newest = tmp_path / "state" / "state-00000003.json"
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.raises(fl.LedgerError, match=r"cannot be compared with the state of the job: .*state-00000003"):
        verify(tmp_path / "state")


def test_a_job_that_was_killed_between_its_ledger_and_its_state_is_right(tmp_path: Path) -> None:
    job(tmp_path)
    state = tmp_path / "state"
    (state / "state-00000003.json").unlink()
    assert verify(state).rounds == 3


def test_what_a_job_left_that_was_killed_before_it_had_a_state_is_set_aside(tmp_path: Path) -> None:
    job(tmp_path)
    state = tmp_path / "state"
    for path in state.glob("state-*.json"):
        path.unlink()
    job(tmp_path)
    assert verify(state).made_again == (0, 1, 2)
    assert (state / f"{NAME}.1").exists()


def test_streams_of_numbers_and_local_variables_are_in_the_ledger_as_they_count(tmp_path: Path) -> None:
    model: WeightDict = {"w": np.zeros(()), "own": np.zeros(2)}
    given: dict[str, Any] = {"stream": True, "exact": True, "policies": {"own": "local"}}
    server = fl.FederatedServer(model, num_rounds=1, durable=tmp_path, ledger=True, keep_contributions=True, **given)
    with server.begin() as one:
        one.start_round(0)
        for name in ("a", "b"):
            weights: Any = {"w": 1.0, "own": np.full(2, 7.0)}
            assert one.receive(name, fl.Contribution(name, weights, 1, round=0)) is not None
        assert one.aggregate()
        one.end_round()
    assert verify(tmp_path).made_again == (0,)
    kept = [read_weights(path) for path in (tmp_path / KEPT).iterdir()]
    assert sorted(map(list, kept)) == [["w"], ["w", "own"]], "of the clients what they share, and the model"


def test_a_round_that_is_missing_is_missed_and_one_with_a_replaced_model_is_told(tmp_path: Path) -> None:
    class Replaces(fl.Handler):
        def after_aggregation(self, ctx: fl.FLContext) -> None:
            if ctx[fl.ContextKey.ROUND] == 1:
                assert ctx.model is not None
                assert ctx.model.weights is not None
                ctx.set_model(fl.ModelData({**ctx.model.weights, "w": ctx.model.weights["w"] + 1}))

    job(tmp_path, handlers=[Replaces()])
    assert verify(tmp_path / "state").replaced == (1,)
