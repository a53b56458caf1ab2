"""Which kernel is used, how many threads it may use, and that the pool works wherever Python code may find itself."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, At, clients_of, server_of
from reference import DTYPES, KERNELS, SIZES, Array, bits, num_threads, values

import fed_learn as fl
from fed_learn.aggregation import weighted_average
from fed_learn.errors import FedLearnError, KernelNameError
from fed_learn.kernels import threads
from fed_learn.weights import WeightDict

pytestmark = pytest.mark.quick

OWN_THREADS = tuple(name for name in KERNELS if name != "torch")
"""Torch has threads of its own, and may not be imported in the process that is tested."""
needs_native = pytest.mark.skipif("native" not in KERNELS, reason="the native kernel was not built")


@pytest.fixture(autouse=True)
def default_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the environment nor an earlier test decides."""
    monkeypatch.delenv("FED_LEARN_KERNEL", raising=False)
    monkeypatch.delenv("FED_LEARN_NUM_THREADS", raising=False)
    fl.kernels.set_num_threads(None)
    yield
    fl.kernels.set_num_threads(None)


def python(code: str, *arguments: str, **environment: str) -> str:
    """Runs code in a fresh interpreter, which must succeed and complain of nothing; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


CLIENTS: list[dict[str, Array]] = [
    {f"{dtype}": values(np.random.default_rng([k, j]), dtype, 1025) for j, dtype in enumerate(DTYPES)} for k in range(3)
]


def mean(kernel: str | None = None) -> WeightDict:
    return weighted_average(CLIENTS, [1, 2, 3], kernel=kernel)


# Which kernels there are


def test_every_kernel_is_either_available_or_unavailable_for_a_reason() -> None:
    available, unavailable = fl.kernels.available(), fl.kernels.unavailable()
    assert set(available) & set(unavailable) == set()
    assert {"native", "numpy"} <= set(available) | set(unavailable)
    assert all(unavailable.values())


@needs_native
def test_native_is_preferred_where_it_is_available() -> None:
    assert fl.kernels.available()[0] == "native"
    assert fl.kernels.current() == "native"


WITHOUT_NATIVE = """
import sys
sys.modules["fed_learn.kernels._native"] = None  # as where the extension was not built
import numpy as np
import fed_learn as fl
from fed_learn.errors import FedLearnError, KernelUnavailableError
"""


def test_without_the_extension_the_package_works_on_numpy_and_says_why() -> None:
    code = """
assert fl.kernels.available() == ("numpy",)
assert "not built" in fl.kernels.unavailable()["native"]
assert fl.kernels.current() == "numpy"
print(fl.weighted_average([{"w": np.ones(3)}, {"w": np.zeros(3)}])["w"].tolist())
"""
    assert python(WITHOUT_NATIVE + code) == "[0.5, 0.5, 0.5]"


@pytest.mark.not_quick
@pytest.mark.parametrize(
    "attempt",
    [
        'fl.kernels.use("native").__enter__()',
        'fl.kernels.resolve("native")',
        'fl.weighted_average([{"w": np.ones(3)}], kernel="native")',
        'fl.Accumulator(kernel="native")',
        'os.environ.update(FED_LEARN_KERNEL="native"); fl.kernels.current()',
        'os.environ.update(FED_LEARN_KERNEL="native"); fl.weighted_average([{"w": np.ones(3)}])',
        'os.environ.update(FED_LEARN_KERNEL="native"); fl.Accumulator()',
    ],
)
def test_without_the_extension_asking_for_native_is_an_error_and_never_numpy(attempt: str) -> None:
    code = f"""
import os
try:
    {attempt}
except KernelUnavailableError as error:
    assert isinstance(error, RuntimeError) and isinstance(error, FedLearnError)
    assert "not built" in error.reason
    assert "\\n" not in str(error)
    print(str(error).split(":")[0])
"""
    assert python(WITHOUT_NATIVE + code) == "kernel 'native' is not available"


COUNTED = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    count = 0

    def find_spec(self, name, path, target=None):
        if name == "fed_learn.kernels._native":
            Missing.count += 1
            raise ImportError("cannot load it")  # as a broken library would
        return None

sys.meta_path.insert(0, Missing())
import numpy as np
import fed_learn as fl

for _ in range(5):
    fl.weighted_average([{"w": np.ones(3)}])
    fl.Accumulator().add({"w": np.ones(3)}, 1)
    assert fl.kernels.current() == "numpy"
    assert fl.kernels.available() == ("numpy",)
    assert "cannot load it" in fl.kernels.unavailable()["native"]
    try:
        fl.kernels.resolve("native")
    except fl.KernelUnavailableError as error:
        assert "cannot load it" in error.reason
    else:
        raise AssertionError("it was found")
print(Missing.count)
"""


def test_an_extension_that_cannot_be_loaded_is_tried_once_and_not_at_every_call() -> None:
    assert python(COUNTED) == "1"


def test_importing_the_package_neither_chooses_a_kernel_nor_starts_a_thread() -> None:
    code = "import threading, fed_learn; print(threading.active_count())"
    assert python(code, FED_LEARN_KERNEL="abacus", FED_LEARN_NUM_THREADS="many") == "1"


# Which one is used


@pytest.mark.parametrize("kernel", KERNELS)
def test_use_decides_within_the_block(kernel: str) -> None:
    before = fl.kernels.current()
    with fl.kernels.use(kernel):
        assert fl.kernels.current() == kernel
        assert fl.kernels.resolve().name == kernel
    assert fl.kernels.current() == before


@needs_native
def test_use_nests() -> None:
    seen = [fl.kernels.current()]
    with fl.kernels.use("numpy"):
        seen.append(fl.kernels.current())
        with fl.kernels.use("native"):
            seen.append(fl.kernels.current())
            with fl.kernels.use("numpy"):
                seen.append(fl.kernels.current())
            seen.append(fl.kernels.current())
        with fl.kernels.use("auto"):
            seen.append(fl.kernels.current())
        seen.append(fl.kernels.current())
    seen.append(fl.kernels.current())
    assert seen == ["native", "numpy", "native", "numpy", "native", "native", "numpy", "native"]


@needs_native
def test_use_restores_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), fl.kernels.use("numpy"):
        raise ZeroDivisionError
    assert fl.kernels.current() == "native"
    with fl.kernels.use("numpy"):
        with pytest.raises(KernelNameError), fl.kernels.use("abacus"):
            pass
        assert fl.kernels.current() == "numpy"
    assert fl.kernels.current() == "native"


@needs_native
def test_choice_does_not_reach_other_threads() -> None:
    with fl.kernels.use("numpy"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(fl.kernels.current).result() == "native"
        assert fl.kernels.current() == "numpy"


@needs_native
def test_choice_of_another_thread_does_not_reach_this_one() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> str:
        with fl.kernels.use("numpy"):
            inside.set()
            leave.wait()
            return fl.kernels.current()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        inside.wait()
        here = fl.kernels.current()
        leave.set()
        assert (here, future.result()) == ("native", "numpy")


@needs_native
def test_choice_of_a_task_stays_with_the_task() -> None:
    async def task(kernel: str, gate: asyncio.Event) -> str:
        with fl.kernels.use(kernel):
            await gate.wait()
            return fl.kernels.current()

    async def main() -> list[str]:
        gate = asyncio.Event()
        tasks = [asyncio.create_task(task(kernel, gate)) for kernel in ("numpy", "native", "numpy")]
        await asyncio.sleep(0)
        gate.set()
        return [*(await asyncio.gather(*tasks)), fl.kernels.current()]

    assert asyncio.run(main()) == ["numpy", "native", "numpy", "native"]


@needs_native
def test_argument_of_a_call_beats_use_which_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("native", "numpy"):
        kernel = type(fl.kernels.resolve(name))

        def spy(self: Any, *rest: Any, original: Any = kernel.weighted_mean) -> Any:
            calls.append(self.name)
            return original(self, *rest)

        monkeypatch.setattr(kernel, "weighted_mean", spy)
    mean()
    monkeypatch.setenv("FED_LEARN_KERNEL", "numpy")
    mean()
    with fl.kernels.use("native"):
        mean()
        mean("numpy")
    with fl.kernels.use("auto"):
        mean()
    mean("auto")
    assert calls == ["native", "numpy", "native", "numpy", "native", "native"]


@pytest.mark.parametrize("max_workers", [1, 3])
def test_choice_around_a_job_reaches_its_learners_and_handlers(max_workers: int) -> None:
    seen: dict[str, set[str]] = {"train": set(), "validate": set(), "handler": set()}

    def score(weights: WeightDict) -> float:
        seen["validate"].add(fl.kernels.current())
        return 0.5

    def handle(ctx: fl.FLContext) -> None:
        seen["handler"].add(fl.kernels.current())

    learners = {
        name: AddingLearner(1, score=score, during=lambda ctx: seen["train"].add(fl.kernels.current())) for name in "ab"
    }
    server, clients = server_of(2), clients_of(learners, handlers=[At(fl.EventType.RECEIVE_MODEL, handle)])
    for kernel in KERNELS:
        with fl.kernels.use(kernel):
            server.run(clients, max_workers=max_workers)
        assert list(seen.values()) == [{kernel}] * 3
        for kernels in seen.values():
            kernels.clear()
    server.run(clients, max_workers=max_workers)
    assert list(seen.values()) == [{fl.kernels.available()[0]}] * 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_environment_variable_chooses(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_LEARN_KERNEL", kernel)
    assert fl.kernels.current() == kernel
    framework = "import torch; " if kernel == "torch" else ""
    assert python(f"{framework}import fed_learn as fl; print(fl.kernels.current())") == kernel


@pytest.mark.parametrize("value", ["", "auto"])
def test_empty_environment_variable_means_auto(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_LEARN_KERNEL", value)
    assert fl.kernels.current() == fl.kernels.available()[0]


@pytest.mark.parametrize("name", ["abacus", "Native", "", "numpy ", 7, ["numpy"]], ids=repr)
def test_unknown_kernel_is_an_error_that_says_what_is_valid(name: Any) -> None:
    attempts = (
        lambda: fl.kernels.resolve(name),
        lambda: fl.kernels.use(name).__enter__(),
        lambda: weighted_average([{"w": np.ones(1)}], kernel=name),
        lambda: fl.Accumulator(kernel=name),
    )
    for attempt in attempts:
        with pytest.raises(KernelNameError) as caught:
            attempt()
        assert (isinstance(caught.value, ValueError), isinstance(caught.value, FedLearnError)) == (True, True)
        assert {"auto", "native", "numpy"} <= set(caught.value.valid)
        assert all(kernel in str(caught.value) for kernel in (repr(name), *caught.value.valid))


def test_unknown_kernel_in_the_environment_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FED_LEARN_KERNEL", "abacus")
    for attempt in (fl.kernels.current, fl.kernels.resolve, mean, fl.Accumulator):
        with pytest.raises(KernelNameError, match="FED_LEARN_KERNEL 'abacus' is unknown") as caught:
            attempt()
        assert "numpy" in caught.value.valid
    assert "numpy" in fl.kernels.available()
    with fl.kernels.use("numpy"):
        assert fl.kernels.current() == "numpy"
    assert bits(mean("numpy"))


def test_unknown_kernel_is_refused_before_the_contributions_are_read() -> None:
    def never() -> Iterator[dict[str, Array]]:
        raise AssertionError("was read")
        yield {}

    with pytest.raises(KernelNameError):
        weighted_average(never(), kernel="abacus")


# Threads


def test_threads_default_to_the_usable_processors() -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert fl.kernels.get_num_threads() == usable


def test_set_num_threads_beats_the_environment_and_none_returns_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_LEARN_NUM_THREADS", "5")
    assert fl.kernels.get_num_threads() == 5
    fl.kernels.set_num_threads(3)
    assert fl.kernels.get_num_threads() == 3
    fl.kernels.set_num_threads(None)
    assert fl.kernels.get_num_threads() == 5
    code = "import fed_learn as fl; print(fl.kernels.get_num_threads())"
    assert python(code, FED_LEARN_NUM_THREADS="7") == "7"


def test_empty_variable_for_threads_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    default = fl.kernels.get_num_threads()
    monkeypatch.setenv("FED_LEARN_NUM_THREADS", "")
    assert fl.kernels.get_num_threads() == default


@pytest.mark.parametrize("count", [0, -1, 1.5, 2.0, True, "2", np.nan], ids=repr)
def test_impossible_number_of_threads_is_refused_and_changes_nothing(count: Any) -> None:
    fl.kernels.set_num_threads(2)
    with pytest.raises(ValueError, match="at least 1"):
        fl.kernels.set_num_threads(count)
    assert fl.kernels.get_num_threads() == 2


@pytest.mark.parametrize("setting", ["0", "-1", "1.5", "many", " ", "²"])
def test_impossible_number_in_the_environment_is_an_error_that_names_the_variable(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FED_LEARN_NUM_THREADS", setting)
    with pytest.raises(ValueError, match="FED_LEARN_NUM_THREADS must be a number of at least 1") as caught:
        fl.kernels.get_num_threads()
    assert repr(setting) in str(caught.value)
    fl.kernels.set_num_threads(1)
    assert fl.kernels.get_num_threads() == 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("size", SIZES[:10])
def test_more_threads_than_work_give_the_same_bits(kernel: str, count: int, size: int) -> None:
    rng = np.random.default_rng([1, size])
    clients = [{f"counts/{dtype}": values(rng, dtype, max(size, 1)) for dtype in DTYPES} for _ in range(3)]
    with num_threads(1):
        expected = bits(weighted_average(clients, [1, 2, 3], kernel=kernel))
    with num_threads(count, smallest_share=1):
        assert bits(weighted_average(clients, [1, 2, 3], kernel=kernel)) == expected


def test_small_work_stays_on_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    fl.kernels.set_num_threads(8)
    monkeypatch.setattr(threads, "ThreadPoolExecutor", None)  # making a pool would fail
    assert bits(mean()) == bits(mean("numpy"))


def test_shares_run_side_by_side_and_the_first_one_on_the_calling_thread() -> None:
    fl.kernels.set_num_threads(3)
    barrier = threading.Barrier(3)
    ran: dict[int, threading.Thread] = {}

    def share(number: int) -> None:
        barrier.wait()
        ran[number] = threading.current_thread()

    threads.run(share, [0, 1, 2])
    assert ran[0] is threading.current_thread()
    assert len(set(ran.values())) == 3


@pytest.mark.parametrize("failing", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_failure_of_a_share_reaches_the_caller_once_all_have_ended(failing: tuple[int, ...]) -> None:
    fl.kernels.set_num_threads(3)
    ended: set[int] = set()

    def share(number: int) -> None:
        ended.add(number)
        if number in failing:
            raise ArithmeticError(number)

    with pytest.raises(ArithmeticError) as caught:
        threads.run(share, [0, 1, 2])
    assert caught.value.args == (failing[0],)
    assert ended == {0, 1, 2}


def test_nothing_to_run_runs_nothing() -> None:
    ran: list[int] = []
    threads.run(ran.append, [])
    assert ran == []


class OnlyOne(ThreadPoolExecutor):
    """Takes one task and runs it when it is waited for; for the next one there is no thread any more."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(1)
        self.count = 0

    def submit(self, function: Any, /, *arguments: Any, **rest: Any) -> Any:
        self.count += 1
        if self.count > 1:
            raise RuntimeError("can't start new thread")
        task = super().submit

        class Waited:
            def exception(self) -> Any:
                return task(function, *arguments, **rest).exception()

            def result(self) -> Any:
                return task(function, *arguments, **rest).result()

        return Waited()


def test_pool_that_cannot_start_a_thread_leaves_no_share_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares write to memory that the caller may free after an error, so those submitted must have ended by then."""
    fl.kernels.set_num_threads(3)
    monkeypatch.setattr(threads, "ThreadPoolExecutor", OnlyOne)
    monkeypatch.setattr(threads, "_pool", None)
    ended: list[int] = []
    with contextlib.suppress(RuntimeError):  # running the rest on the calling thread would be as good
        threads.run(ended.append, [0, 1, 2])
    assert 1 in ended


def test_number_of_threads_may_change_while_others_are_averaging() -> None:
    expected = bits(mean("numpy"))
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for count in (1, 2, 3, 4):
                fl.kernels.set_num_threads(count)

    with num_threads(2), ThreadPoolExecutor(3) as pool:
        changing = pool.submit(change)
        try:
            futures = [pool.submit(lambda: [bits(mean()) for _ in range(30)]) for _ in range(2)]
            results = [one for future in futures for one in future.result()]
        finally:
            done.set()
        changing.result()
    assert len(results) == 60
    assert all(result == expected for result in results)


@pytest.mark.parametrize("kernel", KERNELS)
def test_callers_on_many_threads_share_the_pool_and_get_the_same_bits(kernel: str) -> None:
    expected = bits(mean("numpy"))
    with num_threads(3), ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(lambda: [bits(mean(kernel)) for _ in range(20)]) for _ in range(6)]
        results = [one for future in futures for one in future.result()]
    assert len(results) == 120
    assert all(result == expected for result in results)


FORKED = """
import os, signal, sys
import numpy as np
import fed_learn as fl
from fed_learn.kernels import threads

threads.SMALLEST_SHARE = 64
fl.kernels.set_num_threads(3)
clients = [{"w": np.random.default_rng(k).standard_normal(9999)} for k in range(5)]

def mean():
    return fl.weighted_average(clients, [1, 2, 3, 4, 5])["w"].tobytes()

expected = mean()
assert sys.argv[1] == "numpy" or threads._pool is not None, "no pool was made: the test proves nothing"
child = os.fork()
if child == 0:
    signal.alarm(60)  # who waits for threads that only the parent has waits for ever
    fine = mean() == expected and mean() == expected
    os._exit(0 if fine else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert mean() == expected
print("fine")
"""


@pytest.mark.not_quick
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("kernel", OWN_THREADS)
def test_pool_works_in_a_forked_child_and_still_in_its_parent(kernel: str) -> None:
    forked = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)" + FORKED
    assert python(forked, kernel, FED_LEARN_KERNEL=kernel) == "fine"


def test_interpreter_that_used_the_pool_exits() -> None:
    code = FORKED.split("child = ")[0] + "print('fine')"
    assert python(code, "numpy") == "fine"


LATE = (
    FORKED.split("expected = ")[0]
    + """
import atexit
from concurrent.futures import ThreadPoolExecutor

expected = fl.weighted_average(clients, [1, 2, 3, 4, 5], kernel="numpy")["w"].tobytes()

def late():
    try:
        ThreadPoolExecutor(1).submit(print)
    except RuntimeError as error:
        assert "interpreter shutdown" in str(error)
    else:
        raise AssertionError("a thread could be started: the test proves nothing")
    accumulator = fl.Accumulator()
    for number, client in enumerate(clients, 1):
        accumulator.add(client, number)
    print(mean() == expected, accumulator.result()["w"].tobytes() == expected)

if sys.argv[2] == "after":
    assert mean() == expected
atexit.register(late)
"""
)


@pytest.mark.not_quick
@pytest.mark.parametrize("kernel", OWN_THREADS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_averaging_while_the_interpreter_exits_works_whether_or_not_the_pool_was_made(when: str, kernel: str) -> None:
    assert python(LATE, kernel, when, FED_LEARN_KERNEL=kernel) == "True True"


def no_thread(*_: Any, **__: Any) -> None:
    raise RuntimeError("can't start new thread")


def stream() -> fl.Accumulator:
    accumulator = fl.Accumulator()
    for number, client in enumerate(CLIENTS, 1):
        accumulator.add(client, number)
    return accumulator


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize(
    ("owner", "method"), [(ThreadPoolExecutor, "submit"), (threading.Thread, "start")], ids=["submit", "start"]
)
def test_averaging_works_where_no_thread_can_be_started(
    owner: type, method: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bits(mean("numpy"))
    tried: list[int] = []

    def refuse(*_: Any, **__: Any) -> None:
        tried.append(1)
        no_thread()

    monkeypatch.setattr(threads, "_pool", None)
    with num_threads(count), monkeypatch.context() as patch:
        patch.setattr(owner, method, refuse)
        assert bits(mean()) == expected
        assert bits(stream().result()) == expected
    assert bool(tried) == (fl.kernels.current() == "native")


@needs_native
def test_a_share_for_which_no_thread_could_be_started_is_not_added_a_second_time_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The pool has taken a share before it finds that it can start no thread for it.
    expected = bits(mean("numpy"))
    monkeypatch.setattr(threads, "_pool", None)
    with num_threads(2):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            accumulator = stream()
        # Now the pool has its thread, which works off what was left behind first.
        assert bits(mean()) == expected
        assert bits(accumulator.result()) == expected


@needs_native
def test_a_share_for_which_no_thread_could_be_started_does_not_write_to_the_result_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "_pool", None)
    with num_threads(2):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            result = mean()
        for array in result.values():
            array[...] = 0
        mean()
    assert {name: np.count_nonzero(array) for name, array in result.items()} == dict.fromkeys(result, 0)


def work_left_in_the_queue(last: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs three shares of which the third, which calls `last`, could get no thread of its own.

    The one thread there is takes it from the queue while the calling thread is at the first. Returns those that had
    ended when `threads.run` returned.
    """
    refused, begun = threading.Event(), threading.Event()
    started: list[threading.Thread] = []
    ended: list[int] = []
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if started:
            refused.set()
            no_thread()
        started.append(thread)
        start(thread)

    def share(number: int) -> None:
        if number == 0:
            begun.wait(60)  # by then it has long begun, or never will
        elif number == 1:
            refused.wait(60)
        else:
            begun.set()
            last()
        ended.append(number)

    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.setattr(threading.Thread, "start", start_one)
    fl.kernels.set_num_threads(3)
    threads.run(share, [0, 1, 2])
    return ended.copy()


def test_a_share_for_which_no_thread_could_be_started_has_ended_when_run_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sorted(work_left_in_the_queue(lambda: sum(range(3_000_000)), monkeypatch)) == [0, 1, 2]


def test_the_failure_of_a_share_for_which_no_thread_could_be_started_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ZeroDivisionError):
        work_left_in_the_queue(lambda: 1 // 0, monkeypatch)
