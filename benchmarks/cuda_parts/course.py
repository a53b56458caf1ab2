"""The course of one run of `benchmarks/cuda.py`: its time, what was found, what was wrong, and what was left out."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Course:
    """What all steps share.

    Attributes:
        seconds: How long the run may take.
        quick: Whether inputs are small and tests few.
        facts: What was found, as `--json` has it.
        wrong: Why the run has failed.
        left_out: What there was no time for.
    """

    seconds: float
    quick: bool
    facts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - (time.perf_counter() - self._began)

    def say(self, text: str) -> None:
        """Prints a line with the seconds used so far."""
        print(f"[{self.seconds - self.left():6.1f} s] {text}", flush=True)

    def fail(self, reason: str) -> None:
        """Notes that the run has failed, which goes on all the same."""
        self.wrong.append(reason)
        self.say(f"WRONG: {reason}")

    def has(self, seconds: float, what: str) -> bool:
        """Whether so much time is left for something, which is left out otherwise."""
        if self.left() >= seconds:
            return True
        self.leave_out(what)
        return False

    def leave_out(self, what: str) -> None:
        """Notes that there was no time for something."""
        self.left_out.append(what)
        self.say(f"left out, for want of time: {what}")

    def check_time(self) -> None:
        """Ends a step when the time is up.

        Raises:
            TimeoutError: It is.
        """
        if self.left() <= 0:
            raise TimeoutError

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A part of the run; where it fails, the parts after it are still to be seen."""
        self.say(name)
        try:
            yield
        except TimeoutError:
            self.leave_out(f"the rest of: {name}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result of this step
            traceback.print_exc(limit=-4)
            self.fail(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
