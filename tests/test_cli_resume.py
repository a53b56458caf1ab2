"""`fed-learn simulate --resume`: the same bytes after kills, and what is refused."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kill_and_resume import COMMAND, SMALL, contents, kill_and_resume


def run(*arguments: object, cwd: Path | None = None) -> Any:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_jobs_that_are_killed_and_resumed_leave_the_bytes_of_one_that_was_not() -> None:
    outcome = kill_and_resume(4, SMALL, seed=1)
    assert outcome.kills == 4


@pytest.mark.parametrize(
    "options",
    [
        ("--framework", "torch"),
        ("--framework", "mixed", "--policy", "norm=local"),
        ("--kind", "diff", "--exact", "--policy", "output=local", "--patience", "2"),
    ],
    ids=["torch", "mixed with local variables", "differences"],
)
def test_more_rounds_are_those_of_a_longer_job(options: tuple[str, ...], tmp_path: Path) -> None:
    small = ("--clients", "3", "--local-epochs", "1", *options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*small, "--rounds", 3, "--out", whole).returncode == 0
    assert run(*small, "--rounds", 1, "--out", parts).returncode == 0
    done = run("--resume", "--rounds", 3, "--out", parts)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumed after round 1" in done.stdout
    assert contents(parts) == contents(whole)


def test_a_configuration_is_kept_with_the_job(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"handlers": [{"name": "ModelSelectionHandler"}], "num_rounds": 2}))
    small = ("--clients", "2", "--local-epochs", "1", "--config", config)
    assert run(*small, "--rounds", 1, "--out", tmp_path / "a").returncode == 0
    assert run(*small, "--out", tmp_path / "b").returncode == 0
    config.unlink()
    done = run("--resume", "--rounds", 2, "--out", tmp_path / "a")
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_cannot_be_resumed_is_wrong_use(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("--resume", "--out", out)
    assert (done.returncode, done.stderr) == (
        2,
        f"fed-learn: Invalid value for --resume: {out} holds no job that could go on\n",
    )
    assert run("--clients", 2, "--rounds", 2, "--local-epochs", 1, "--out", out).returncode == 0
    before = contents(out)
    for arguments, text in [
        (("--alpha", "0.1"), f"--alpha: the job in {out} was begun with 0.5, not 0.1: leave that out to go on with it"),
        (("--rounds", "1"), "num_rounds is 1, and 2 rounds of the job are over"),
        (("--overwrite",), "--resume: it goes on with a job, and --overwrite would replace it"),
    ]:
        done = run("--resume", "--out", out, *arguments)
        assert done.returncode == 2
        assert text in done.stderr
    assert contents(out) == before


def test_a_damaged_state_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--clients", 2, "--rounds", 1, "--local-epochs", 1, "--out", out).returncode == 0
    for path in (out / "state").glob("state-*.json"):
        path.write_bytes(path.read_bytes()[:-10])
    before = contents(out)
    done = run("--resume", "--rounds", 2, "--out", out)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "state-00000001.json is damaged" in done.stderr
    assert contents(out) == before


def test_a_folder_that_is_not_empty_is_no_place_for_a_job(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    done = run("--rounds", 1, "--out", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} is not empty (thesis.tex): name another folder" in done.stderr
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_jobs_without_a_folder_are_numbered_and_the_newest_is_resumed(tmp_path: Path) -> None:
    small = ("--clients", 2, "--local-epochs", 1, "--rounds", 1)
    for _ in range(3):
        assert run(*small, cwd=tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["fed-learn-job", "fed-learn-job-2", "fed-learn-job-3"]
    done = run("--resume", "--rounds", 2, cwd=tmp_path)
    assert "fed-learn-job-3/summary.json" in done.stdout
    assert contents(tmp_path / "fed-learn-job") == contents(tmp_path / "fed-learn-job-2")
    assert len((tmp_path / "fed-learn-job-3" / "metrics.jsonl").read_text().splitlines()) > len(
        (tmp_path / "fed-learn-job-2" / "metrics.jsonl").read_text().splitlines()
    )


def test_a_job_that_was_killed_while_it_was_to_replace_another_leaves_a_way_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ("--clients", 2, "--local-epochs", 1)
    assert run(*small, "--rounds", 2, "--out", out).returncode == 0
    before = contents(out)
    # Killed before it had a state: the one that was to be replaced is taken up again.
    (out / "state").rename(out / ".earlier-state")
    (out / "state").mkdir()
    done = run("--resume", "--rounds", 3, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (out / ".earlier-state").exists()
    assert contents(out) != before
    # Killed after that: the new one is taken up, and nothing of the other is left.
    parts = tmp_path / "parts_of_this_test.py"
    parts.write_text(
        "import os, signal\nimport fed_learn as fl\n"
        "class Kills(fl.Handler):\n"
        "    def start_round(self, ctx):\n"
        "        if not os.path.exists('killed'):\n"
        "            open('killed', 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"handlers": [{"path": "parts_of_this_test.Kills"}, {"name": "ModelSelectionHandler"}]})
    )
    killed = run(*small, "--rounds", 2, "--out", out, "--overwrite", "--config", config, cwd=tmp_path)
    assert killed.returncode == -9
    assert (out / ".earlier-state").exists()
    done = run("--resume", "--out", out, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "killed").touch()
    assert run(*small, "--rounds", 2, "--out", tmp_path / "whole", "--config", config, cwd=tmp_path).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == sorted([*contents(out), "state", "times.json"])
    assert run(*small, "--rounds", 1, "--out", out, "--overwrite").returncode == 0


def test_the_newest_job_is_resumed_where_an_older_one_is_gone(tmp_path: Path) -> None:
    small = ("--clients", 2, "--local-epochs", 1, "--rounds", 1)
    for _ in range(2):
        assert run(*small, cwd=tmp_path).returncode == 0
    (tmp_path / "fed-learn-job").rename(tmp_path / "elsewhere")
    assert "fed-learn-job-2/summary.json" in run("--resume", "--rounds", 2, cwd=tmp_path).stdout
