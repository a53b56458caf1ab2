"""`ClientPool`: the clients of a running job, and the threads on which they work. Rounds are left to `rounds`."""

import contextvars
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from fed_learn.client.fed_client import FederatedClient
from fed_learn.components.learner import Learner
from fed_learn.components.returned import metric_and_mode, mode_followed
from fed_learn.contribution import check_contributor
from fed_learn.errors import ClientQuitError, HandlerFailure, a_type, as_failure, described
from fed_learn.events import EventType
from fed_learn.kernels.threads import usable_processors

T = TypeVar("T")

logger = logging.getLogger(__name__)

AHEAD = 2
"""So many clients for each worker are asked before the first of their answers is taken, lest a slow one hold it up."""


class ClientPool:
    """The clients that take part in a job, in the order in which they were given.

    Args:
        clients: The clients.
        max_workers: How many work at the same time; None: as many as there are processors.

    Raises:
        ValueError: No clients, a name that is used twice, or a bad `max_workers`.
        TypeError: The clients are no sequence, or one of them has no name.
    """

    def __init__(self, clients: Sequence[FederatedClient], max_workers: int | None = None) -> None:
        self._clients: dict[str, FederatedClient] = {}
        if not isinstance(clients, Iterable):
            raise TypeError(f"clients must be a list of clients, not {clients!r}: pass run([...])")
        for client in clients:
            if not hasattr(client, "name"):
                raise TypeError(f"{a_type(type(client))} is no client: pass fl.FederatedClient(name, learner)")
            if client.name in self._clients:
                raise ValueError(f"two clients are named {client.name!r}")
            self._clients[check_contributor(client.name)] = client
        if not self._clients:
            raise ValueError("a job needs at least one client")
        self._workers = max_workers if max_workers is not None else min(len(self._clients), usable_processors())
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fed_learn-client")

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._clients))

    def __len__(self) -> int:
        return len(self._clients)

    def learners(self) -> dict[str, Learner]:
        """The learner of each client."""
        return {name: client.learner for name, client in self._clients.items()}

    def ask(
        self, question: Callable[[FederatedClient], T], *, few: bool = False
    ) -> Iterator[tuple[str, T | Exception]]:
        """Asks all clients, and yields the name of each with its answer, or with the exception that it raised.

        Answers are in the order of the clients, not in that of arrival, so that a job is the same from run to run.

        Args:
            question: What they are asked.
            few: Whether answers are large, and only a few of them are to be held at a time: then clients are asked some
                ahead of the one whose answer is awaited, and not all at once.
        """
        ahead = AHEAD * self._workers if few else len(self._clients)
        waiting = deque(self._clients.items())
        asked: deque[tuple[str, Future[T]]] = deque()
        while waiting or asked:
            while waiting and len(asked) < ahead:
                name, client = waiting.popleft()
                # In the caller's context, so that a kernel chosen by kernels.use holds for learners too.
                asked.append((name, self._pool.submit(contextvars.copy_context().run, question, client)))
            name, future = asked.popleft()
            error = future.exception()
            if error is None:
                answered = future.result()
                del future  # which holds the answer too
                yield name, answered
                del answered
                continue
            answer = as_failure(error)
            if answer is not error:  # a learner that calls sys.exit ends its client, not the server
                answer = ClientQuitError(f"{name}: {described(error)}", contributor=name)
                answer.__cause__ = error
            yield name, answer

    def states(self) -> dict[str, Any]:
        """What each client hands over to be kept, while none of them works.

        Raises:
            StateError: One could not, or handed over what cannot be kept.
        """
        return {name: client.get_state() for name, client in self._clients.items()}

    def leave_out(self, name: str) -> None:
        """Removes a client that has not been started."""
        del self._clients[name]

    def dismiss(self, name: str) -> tuple[HandlerFailure, ...]:
        """Removes a client and stops it. Returns which of its handlers failed; they have been logged."""
        client = self._clients.pop(name)
        try:
            return client.stop()
        except BaseException as error:
            kind = f"{type(client).__module__}.{type(client).__qualname__}"
            failure = HandlerFailure(EventType.SHUTDOWN, kind, as_failure(error))
            logger.error("%s could not be stopped: %s", name, failure, exc_info=error)
            return (failure.without_tracebacks(),)

    def stop(self, record: Callable[[Sequence[HandlerFailure]], None]) -> None:
        """Waits for the threads, then stops the clients that are left, the last one first, whatever fails in between.

        Args:
            record: Called with the handlers that failed, for each client.
        """
        with ExitStack() as last_first:  # goes on whatever is raised, an interrupt included
            for name in reversed(tuple(self)):
                last_first.callback(lambda name: record(self.dismiss(name)), name)
            last_first.callback(self.close)

    def close(self) -> None:
        """Waits for the clients that work, since a thread cannot be interrupted, and drops questions not yet begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def declared_score(learners: Mapping[str, Learner]) -> tuple[str, str | None]:
    """The metric by which the clients' learners have models selected, and its mode if one of them declares it.

    Raises:
        ValueError: Two learners disagree, so that the mean of their metrics would say nothing.
    """
    first, *others = learners
    metric, mode = metric_and_mode(learners[first])
    for name in others:
        other, its_mode = metric_and_mode(learners[name])
        mine, theirs = ((metric, mode_followed(learners[first])), (other, mode_followed(learners[name])))
        if mine != theirs:
            raise ValueError(
                f"{first} selects models by {metric!r} (mode={mine[1]!r}), and {name} by {other!r} "
                f"(mode={theirs[1]!r}): give their learners the same validation_metric and mode"
            )
        mode = mode if mode is not None else its_mode
    return metric, mode
