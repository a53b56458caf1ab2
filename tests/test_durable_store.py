"""States in a folder: whatever is damaged, full or in use, what is read is a state that was written, or an error."""

import os
import random
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn.durable import StateStore, encoded

pytestmark = pytest.mark.quick


def state(number: int) -> dict[str, Any]:
    """A state of its own for each number; the best model stays the same from the second on."""
    rng = np.random.default_rng(number)
    best = {"w": np.full(700, float(min(number, 1)))}
    return {"number": number, "model": {"w": rng.normal(size=700), "b": rng.normal(size=3)}, "best": best}


TEXTS = {number: encoded(state(number)).text for number in range(6)}


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    with StateStore(tmp_path / "state") as store:
        for number in range(4):
            store.save(number, state(number))
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def loaded(folder: Path) -> int | str:
    """The number of the state that is read, after a look at all of its values; or the error."""
    try:
        number, value = StateStore(folder).load()
    except fl.StateError as error:
        return str(error)
    assert encoded(value).text == TEXTS[number], "what is read was never written"
    return number


def test_the_last_two_states_are_kept_with_the_models_that_they_need(store: StateStore) -> None:
    assert store.numbers() == [2, 3]
    assert loaded(store.folder) == 3
    names = sorted(contents(store.folder))
    assert [name for name in names if name.endswith(".json")] == ["state-00000002.json", "state-00000003.json"]
    assert sum(name.endswith(".safetensors") for name in names) == 3, "two models, and the best one once"


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "mine.safetensors", "state.json", ".state-1.json.tmp"):
        (tmp_path / name).write_text("mine")
    with StateStore(tmp_path) as store:
        for number in range(4):
            store.save(number, state(number))
    assert {"notes.txt", "mine.safetensors", "state.json", ".state-1.json.tmp"} <= set(os.listdir(tmp_path))


def test_a_state_that_is_cut_off_at_any_length_gives_the_one_before(store: StateStore) -> None:
    path = store.folder / "state-00000003.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert loaded(store.folder) == 2
    path.write_bytes(whole)
    assert loaded(store.folder) == 3


def test_a_model_that_is_cut_off_at_any_length_gives_the_state_before(store: StateStore) -> None:
    before = StateStore(store.folder)
    number, _ = before.load()
    assert number == 3
    needed = set(contents(store.folder))
    (store.folder / "state-00000003.json").rename(store.folder.parent / "aside")
    with StateStore(store.folder) as again:
        again.save(3, state(2))
    (model,) = needed - set(contents(store.folder))
    with StateStore(store.folder) as again:
        again.save(3, state(3))
    path = store.folder / model
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 37), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert loaded(store.folder) == 2
    path.unlink()
    assert loaded(store.folder) == 2


def test_a_bit_that_is_flipped_anywhere_is_never_a_wrong_state(store: StateStore) -> None:
    rng = random.Random(0)
    files = contents(store.folder)
    found = []
    for _ in range(1000):
        name = rng.choice(sorted(files))
        place, bit = rng.randrange(len(files[name])), rng.randrange(8)
        damaged = bytearray(files[name])
        damaged[place] ^= 1 << bit
        (store.folder / name).write_bytes(damaged)
        found.append(loaded(store.folder))
        (store.folder / name).write_bytes(files[name])
    assert {3, 2} < set(found), "some are found, and some hit what is not needed"
    texts = [one for one in found if isinstance(one, str)]
    assert texts, "the best model is needed by both states"
    assert all("damaged" in text for text in texts)


def test_a_state_without_its_model_says_which(store: StateStore) -> None:
    for path in store.folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        fl.StateError, match=r"state-00000003\.json needs [0-9a-f]{64}\.safetensors, which is not there"
    ):
        store.load()


def test_a_folder_without_a_state_is_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(fl.StateError, match="holds no state of a job"):
            StateStore(folder).load()


def test_a_state_of_another_version_is_refused(store: StateStore) -> None:
    for path in store.folder.glob("state-*.json"):
        path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(fl.StateError, match="version 2 of the format, and this fed_learn reads version 1"):
        store.load()


def test_a_folder_has_one_writer(store: StateStore) -> None:
    code = f"from fed_learn.durable import StateStore; StateStore({str(store.folder)!r}).open()"
    with store:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "FileInUseError" in done.stderr


def test_what_a_killed_process_left_half_written_is_removed(store: StateStore) -> None:
    half = store.folder / ".state-00000004.json.fed-learn-1.tmp"
    half.write_bytes(b"{")
    with store:
        assert not half.exists()
    assert loaded(store.folder) == 3


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_durable_store import state
from fed_learn.durable import StateStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with StateStore({folder!r}) as store:
    store.load()
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    try:
        for number in (4, 5):
            store.save(number, state(number))
    except OSError as error:
        print(type(error).__name__, error.filename or error)
"""


def test_a_disk_that_is_full_at_any_write_leaves_the_state_before(store: StateStore) -> None:
    before = contents(store.folder)
    largest = max(map(len, before.values()))
    failed = 0
    for limit in (*range(0, largest + 200, 400), largest + 10_000):
        code = FULL.format(tests=str(Path(__file__).parent), folder=str(store.folder), limit=limit)
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
        number = loaded(store.folder)
        failed += bool(done.stdout)
        assert number == (3 if done.stdout else 5), done.stdout
        assert not list(store.folder.glob("*.tmp"))
        for path in store.folder.iterdir():
            path.unlink()
        for name, data in before.items():
            (store.folder / name).write_bytes(data)
    assert failed > 10
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_an_error_of_the_system(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        StateStore(tmp_path / "state").open()


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        StateStore(tmp_path / "file" / "state").open()
