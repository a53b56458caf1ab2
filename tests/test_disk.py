"""What jobs write: whole or not at all, by one job at a time, and never over what an earlier one left."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, At, clients_of, initial_weights
from safetensors.numpy import load_file

import fed_learn as fl
from fed_learn.disk import Claim, append_line, is_stream, set_aside, write_whole
from fed_learn.handlers import CheckpointHandler, JsonLinesHandler

pytestmark = pytest.mark.quick

resource = pytest.importorskip("resource")


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """A disk that is full for a while: what exceeds the size is cut off in the middle of a write."""
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


# Lines


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, "first")
    for room in range(6, 13):  # "first\n" and some of "second\n"
        with no_file_longer_than(room), pytest.raises(OSError, match="File too large"):
            append_line(path, "second")
        assert path.read_text() == "first\n"
    with no_file_longer_than(13):
        append_line(path, "second", flushed=False)
    assert path.read_text() == "first\nsecond\n"


def test_a_line_is_not_glued_to_the_half_of_one_that_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("first\nsec")
    append_line(path, "third")
    assert path.read_text() == "first\nsec\nthird\n"


def test_a_log_on_a_disk_that_is_full_in_one_round_has_the_lines_of_all_others(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    handlers = [JsonLinesHandler(path)]
    server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=5, handlers=handlers, on_handler_error="log")
    with server.begin(num_clients=1) as job:
        for number in range(5):
            job.start_round(number)
            job.receive("s", fl.Contribution("s", {"w": np.ones(1)}, 1, round=number))
            job.aggregate()
            room = path.stat().st_size + 100 if number == 2 else 10**6
            with no_file_longer_than(room):
                job.end_round()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 3, 4]
    assert [failure.round for failure in job.result().handler_failures] == [2]


def test_lines_go_to_a_pipe_too(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert is_stream(path)
    code = f"print(open({str(path)!r}).read(), end='')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as reader:
        server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=[JsonLinesHandler(path)])
        writing = os.open(path, os.O_WRONLY)  # open all the while, so that the reader waits for all lines
        server.run(clients_of({"a": AddingLearner(1)}))
        os.close(writing)
        read, _ = reader.communicate()
    assert [json.loads(line)["type"] for line in read.splitlines()] == ["round", "validation", "validation"]
    assert os.listdir(tmp_path) == ["pipe"]


def test_the_standard_output_is_a_stream_even_where_it_is_a_file_and_shared_memory_is_none(tmp_path: Path) -> None:
    code = "from pathlib import Path; from fed_learn.disk import is_stream; print(is_stream(Path('/dev/stdout')))"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "True\n"
    assert not is_stream(Path("/dev/shm/job.jsonl"))
    assert not is_stream(tmp_path / "job.jsonl")


# Whole files


def test_the_folder_is_flushed_after_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flushed, real = tmp_path / "file", [], os.fsync

    def watch(descriptor: int) -> None:
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        real(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no way to see which file a descriptor belongs to")
    monkeypatch.setattr(os, "fsync", watch)
    write_whole(path, b"data")
    beside = tmp_path / f".file.fed-learn-{os.getpid()}.tmp"
    assert flushed == [(str(beside), False), (str(tmp_path), True)]
    flushed.clear()
    append_line(tmp_path / "log", "first")
    append_line(tmp_path / "log", "second")
    append_line(tmp_path / "log", "third", flushed=False)
    assert [where for where, _ in flushed] == [str(tmp_path / "log"), str(tmp_path), str(tmp_path / "log")]


def test_a_file_that_does_not_fit_on_the_disk_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with no_file_longer_than(5), pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "file", b"longer than that")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_pipe_is_written_to_and_not_replaced_by_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(path, b"data")
    assert os.read(reading, 100) == b"data"
    os.close(reading)
    assert path.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


# Claims

HOLDER = """
import sys
from pathlib import Path
from fed_learn.disk import Claim
Claim([Path(sys.argv[1])]).take()
Path(sys.argv[1]).with_name(f".{Path(sys.argv[1]).name}.fed-learn-4711.tmp").write_bytes(b"half")
print("taken", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process_writes(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def test_a_file_that_another_process_writes_is_refused_until_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with another_process_writes(path) as process:
        for _ in range(2):
            with pytest.raises(fl.FileInUseError, match=f"process {process.pid} on ") as caught:
                Claim([tmp_path / "free", path]).take()
        assert caught.value.path == str(path)
        assert str(caught.value).startswith(f"{path} is being written by another job (process {process.pid} on ")
        assert os.listdir(tmp_path) == ["new"], "none is held where one is refused"
        assert ".file.fed-learn-4711.tmp" in os.listdir(path.parent), "of a process that is alive"
        process.kill()
        process.wait()
    with Claim([path]):
        assert os.listdir(path.parent) == [".file.fed-learn.lock"], "what the killed process left half-written is gone"
    assert os.listdir(path.parent) == []


def test_a_forked_worker_that_outlives_a_killed_job_keeps_none_of_its_files(tmp_path: Path) -> None:
    forking = HOLDER.replace("print(", "import os; os.fork() or (sys.stdin.read(), os._exit(0)); print(")
    command = [sys.executable, "-c", forking, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(fl.FileInUseError):
            Claim([tmp_path / "file"]).take()
        process.kill()
        process.wait()
        with Claim([tmp_path / "file"]):  # the worker waits for its input to end
            assert os.listdir(tmp_path) == [".file.fed-learn.lock"]


def test_only_what_is_certainly_left_over_is_removed(tmp_path: Path) -> None:
    others = [
        ".file.tmp",
        "file.fed-learn-1.tmp",
        ".file.fed-learn-x.tmp",
        ".other.fed-learn-1.tmp",
        "f.fed-learn.lock",
    ]
    for name in [*others, ".file.fed-learn-1.tmp"]:
        (tmp_path / name).touch()
    with Claim([tmp_path / "file"]):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_job_that_was_never_shut_down_does_not_stop_the_next_one_of_its_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "job.jsonl"
    old, new = Claim([path]), Claim([path])
    old.take()
    old.take()
    assert caplog.records == []
    new.take()
    (record,) = caplog.records
    assert record.getMessage() == f"{path} is also written by an earlier job of this process, which was not shut down"
    old.release()
    assert os.listdir(tmp_path) == [".job.jsonl.fed-learn.lock"], "it is the new one that holds it"
    new.release()
    assert os.listdir(tmp_path) == []


def test_a_forked_child_does_not_give_up_what_its_parent_holds(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from fed_learn import FileInUseError
from fed_learn.disk import Claim
claim = Claim([Path({str(tmp_path / "file")!r})])
claim.take()
child = os.fork()
if not child:
    claim.release()
    try:
        Claim(claim.paths).take()
    except FileInUseError:
        os._exit(7)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.listdir({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "7 ['.file.fed-learn.lock']\n"


def test_where_a_file_system_has_no_locks_the_job_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    (tmp_path / ".file.fed-learn-1.tmp").touch()
    with Claim([tmp_path / "file"]):
        # It may be that of a job that is alive: nothing tells.
        assert (tmp_path / ".file.fed-learn-1.tmp").exists()
    assert "cannot be locked: [Errno 37] No locks available" in caplog.text


# Earlier jobs

HANDLERS: list[Callable[[Path, bool], fl.Handler]] = [
    lambda path, overwrite: JsonLinesHandler(path / "job.jsonl", overwrite=overwrite),
    lambda path, overwrite: CheckpointHandler(path, overwrite=overwrite),
]
every_writer = pytest.mark.parametrize("writer", HANDLERS, ids=["JsonLinesHandler", "CheckpointHandler"])


def run(*handlers: fl.Handler) -> fl.JobResult:
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=[fl.ModelSelectionHandler(), *handlers])
    return server.run(clients_of({"a": AddingLearner(1)}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@every_writer
def test_what_an_earlier_job_wrote_is_kept_and_told(
    writer: Callable[[Path, bool], fl.Handler], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(writer(tmp_path, False))
    first = {name: data + b" " for name, data in contents(tmp_path).items()}
    for name, data in first.items():
        (tmp_path / name).write_bytes(data)
    caplog.clear()
    run(writer(tmp_path, False))
    assert {name: data for name, data in contents(tmp_path).items() if name.endswith(".1")} == {
        f"{name}.1": data for name, data in first.items()
    }
    assert sorted(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING) == [
        f"{tmp_path / name} of an earlier job is kept as {name}.1; overwrite=True replaces it" for name in sorted(first)
    ]
    run(writer(tmp_path, False))
    assert sorted(contents(tmp_path)) == sorted(name + end for name in first for end in ("", ".1", ".2"))


@every_writer
def test_what_an_earlier_job_wrote_is_replaced_where_that_is_asked_for(
    writer: Callable[[Path, bool], fl.Handler], tmp_path: Path
) -> None:
    run(writer(tmp_path, True))
    names = sorted(contents(tmp_path))
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    run(writer(tmp_path, True))
    assert sorted(contents(tmp_path)) == names
    assert b"old" not in contents(tmp_path).values()


@pytest.mark.parametrize("overwrite", [False, True])
@every_writer
def test_a_job_that_cannot_start_leaves_the_files_of_an_earlier_one_as_they_are(
    writer: Callable[[Path, bool], fl.Handler], overwrite: bool, tmp_path: Path
) -> None:
    def fail(ctx: fl.FLContext) -> None:
        raise RuntimeError("not today")

    run(writer(tmp_path, False))
    before = contents(tmp_path)
    for event in (fl.EventType.STARTUP, fl.EventType.START_ROUND):
        with pytest.raises(fl.HandlerError, match="not today"):
            run(writer(tmp_path, overwrite), At(event, fail))
        assert contents(tmp_path) == before


@pytest.mark.not_quick
@every_writer
def test_a_file_that_another_job_writes_is_an_error_when_a_job_starts(
    writer: Callable[[Path, bool], fl.Handler], tmp_path: Path
) -> None:
    run(writer(tmp_path, False))
    before = contents(tmp_path)
    with another_process_writes(tmp_path / sorted(before)[0]):
        with pytest.raises(fl.HandlerError) as caught:
            run(writer(tmp_path, False))
        (failure,) = caught.value.failures
        assert failure.event == fl.EventType.STARTUP
        assert isinstance(failure.exception, fl.FileInUseError)
        assert {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")} == before


@every_writer
def test_a_handler_at_work_can_be_pickled_and_the_copy_holds_no_file(
    writer: Callable[[Path, bool], fl.Handler], tmp_path: Path
) -> None:
    handler, ctx = writer(tmp_path, False), fl.FLContext()
    fl.fire_event(fl.EventType.STARTUP, [handler], ctx)
    copy = pickle.loads(pickle.dumps(handler))
    held = sorted(os.listdir(tmp_path))
    assert held
    fl.fire_event(fl.EventType.SHUTDOWN, [copy], ctx)
    assert sorted(os.listdir(tmp_path)) == held
    fl.fire_event(fl.EventType.SHUTDOWN, [handler], ctx)
    assert os.listdir(tmp_path) == []


def test_handlers_that_are_driven_by_hand_without_a_startup_keep_what_was_there_too(tmp_path: Path) -> None:
    (tmp_path / "global.safetensors").write_bytes(b"old")
    handler = CheckpointHandler(tmp_path)
    ctx = fl.FLContext({fl.ContextKey.ROUND: 0}, model=fl.ModelData({"w": np.ones(2)}))
    fl.fire_event(fl.EventType.END_ROUND, [handler], ctx)
    fl.fire_event(fl.EventType.SHUTDOWN, [handler], ctx)
    assert load_file(tmp_path / "global.safetensors")["w"].tolist() == [1.0, 1.0]
    assert (tmp_path / "global.safetensors.1").read_bytes() == b"old"


def test_a_name_that_is_taken_is_not_taken_again(tmp_path: Path) -> None:
    for name in ("log", "log.1", "log.3"):
        (tmp_path / name).write_text(name)
    set_aside(tmp_path / "log")
    set_aside(tmp_path / "log")
    assert contents(tmp_path) == {"log.1": b"log.1", "log.2": b"log", "log.3": b"log.3"}


# Links


def test_a_link_stays_where_it_is_and_all_that_is_written_goes_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    for name in ("job.jsonl", "global.safetensors"):
        (tmp_path / name).symlink_to(Path("large", name))
    for adds in (1, 3):
        handlers = [JsonLinesHandler(tmp_path / "job.jsonl"), CheckpointHandler(tmp_path)]
        server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=1, handlers=handlers)
        server.run(clients_of({"a": AddingLearner(adds)}))
        assert (tmp_path / "job.jsonl").is_symlink()
        assert (tmp_path / "global.safetensors").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["global.safetensors", "job.jsonl", "large"]
    large = tmp_path / "large"
    assert sorted(os.listdir(large)) == ["global.safetensors", "global.safetensors.1", "job.jsonl", "job.jsonl.1"]
    assert load_file(large / "global.safetensors.1")["w"].tolist() == [1.0]
    assert load_file(large / "global.safetensors")["w"].tolist() == [3.0]


@pytest.mark.parametrize("handler", [JsonLinesHandler, CheckpointHandler])
def test_what_is_replaced_is_the_file_to_which_a_link_leads(handler: Any, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    name = "job.jsonl" if handler is JsonLinesHandler else "best.safetensors"
    (tmp_path / "large" / name).write_text("old")
    (tmp_path / name).symlink_to(Path("large", name))
    one = handler(tmp_path / name if handler is JsonLinesHandler else tmp_path, overwrite=True)
    server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=1, handlers=[one])
    server.run(clients_of({"a": AddingLearner(1)}))
    assert (tmp_path / name).is_symlink()
    kept = contents(tmp_path / "large")
    assert kept == {} if handler is CheckpointHandler else kept[name] != b"old"


def test_two_links_to_one_file_are_one_file_to_a_claim(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to("file")
    with Claim([tmp_path / "a"]), Claim([tmp_path / "b"]):
        assert sorted(os.listdir(tmp_path)) == [".file.fed-learn.lock", "a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'b'} is also written by an earlier job of this process, which was not shut down"
    ]


def test_a_file_that_may_be_written_in_a_folder_that_may_not_is_written_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:  # as by the folder; who runs as root may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fed_learn.disk._lock", refused)
    path = tmp_path / "log.jsonl"
    with pytest.raises(PermissionError), Claim([path]):
        pass
    path.write_text("")
    with Claim([path]):
        append_line(path, "{}")
    assert path.read_text() == "{}\n"
    assert "no second job can be kept from writing it" in caplog.text
