"""The tests of devices, in processes of their own beside the comparisons: on a GPU none of those for it may skip."""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET  # of a report that we have made ourselves
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks.cuda_parts.course import Course

ROOT = Path(__file__).parents[2]
FILES = "tests/cuda/test_*.py"
QUICK = ("tests/cuda/test_devices.py", "several_streams or are_refused or by_way_of_the_host")
"""A file, and which of its tests."""
FOR_GPUS = re.compile(r"\[.*\b(real|cuda)\b.*\]")
"""Tests that are meant for a GPU, by their parameters."""
NONE_RUN = 5
"""What pytest exits with when no test was run, as where a file needs Triton and there is none."""


class Run(NamedTuple):
    """A file of tests that is being run."""

    name: str
    process: subprocess.Popen[str]
    output: Path
    report: Path


class Suite:
    """The tests, which run from when this is made until `collect`.

    Args:
        course: The course of the script.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self._folder = tempfile.TemporaryDirectory()
        files = [QUICK[0]] if course.quick else sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(FILES))
        self._runs = [self._started(name, ["-k", QUICK[1]] if course.quick else []) for name in files]
        course.say(f"tests begin: {' '.join(files)}")

    def _started(self, name: str, chosen: list[str]) -> Run:
        report, output = (Path(self._folder.name, Path(name).stem).with_suffix(end) for end in (".xml", ".txt"))
        options = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, name, *chosen]
        with output.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, text=True)
        return Run(name, process, output, report)

    def collect(self, seconds: float) -> None:
        """Waits until all have ended, for so many seconds at most, and judges them."""
        deadline = self._course.left() - seconds
        for run in self._runs:
            with self._course.step(f"tests of {run.name}"):
                try:
                    run.process.wait(max(1.0, self._course.left() - deadline))
                except subprocess.TimeoutExpired as error:
                    run.process.kill()
                    run.process.wait()
                    raise TimeoutError from error
                self._judge(run)
        self._folder.cleanup()

    def _judge(self, run: Run) -> None:
        course, output, gpu = self._course, run.output.read_text(encoding="utf-8"), torch.cuda.is_available()
        cases = list(ET.parse(run.report).getroot().iter("testcase")) if run.report.exists() else []
        failed = [case.get("name", "") for case in cases if {"failure", "error"} & {part.tag for part in case}]
        skipped = [case.get("name", "") for case in cases if "skipped" in {part.tag for part in case}]
        course.facts.setdefault("tests", {})[run.name] = {"run": len(cases), "failed": failed, "skipped": skipped}
        passed = len(cases) - len(failed) - len(skipped)
        course.say(f"{run.name}: {passed} passed, {len(failed)} failed, {len(skipped)} skipped")
        none_run = run.process.returncode == NONE_RUN and not gpu
        if run.process.returncode and not none_run:
            print(output[-8000:], flush=True)
            course.fail(f"{run.name} ends with {run.process.returncode}: {', '.join(failed) or output[-200:]}")
        left_out = [name for name in skipped if FOR_GPUS.search(name)]
        if gpu and left_out:
            course.fail(f"tests for a GPU were skipped: {', '.join(left_out)}")
