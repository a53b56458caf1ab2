"""What is shown of an error that a client sends: its type and its message, whole, in one line."""

import pytest
from flwr.app import Error

from fed_learn.integrations.flower.replies import failure_of

FLOWERS = [
    ("<class 'ZeroDivisionError'>:<'division by zero'>", "ZeroDivisionError: division by zero"),
    ("<class 'KeyError'>:<''w''>", "KeyError: 'w'"),
    ("<class 'ValueError'>:<'got <class 'int'>'>", "ValueError: got <class 'int'>"),
    ("<class 'a.b.Oops'>:<''>", "Oops"),
    (
        "<class 'RuntimeError'>:<'CUDA out of memory.\n  Tried to allocate 2 GiB'>",
        "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB",
    ),
    (
        "<class 'flwr.clientapp.client_app.ClientAppException'>:<'\nException ValueError occurred. Message: it's >5'>",
        "ValueError: it's >5",
    ),
    (
        "<class 'x.RayTaskError'>:<'ray::run()\n  File \"a.py\", line 3\nValueError: boom'>",
        "RayTaskError: ValueError: boom",
    ),
    ("no reason <'at all'>", "no reason <'at all'>"),
    ("OSError: disk '/data'", "OSError: disk '/data'"),
    ("", "no reason given"),
    ("<class 'ValueError'>:<'" + "x" * 600 + "'>", "ValueError: " + "x" * 500 + "…"),
]


class Reply:
    def __init__(self, reason: str) -> None:
        self.error = Error(3, reason)


@pytest.mark.parametrize(("reason", "shown"), FLOWERS)
def test_the_type_and_the_whole_message_are_shown(reason: str, shown: str) -> None:
    assert str(failure_of(Reply(reason), 17)) == f"node-17: {shown} (code 3)"  # type: ignore[arg-type]
