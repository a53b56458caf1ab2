"""The demo job: a federation on a real data set, put together from the library's parts."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from fed_learn import handlers as builtin_handlers
from fed_learn.client import FederatedClient
from fed_learn.components import ModelEvaluator
from fed_learn.components.config import build_component
from fed_learn.contribution import Kind
from fed_learn.events import EventHandler
from fed_learn.handlers import ModelSelectionHandler, ServerValidationHandler
from fed_learn.server import FederatedServer, JobResult
from fed_learn.simulation.datasets import Dataset, Split, load_split
from fed_learn.simulation.frameworks import networks
from fed_learn.simulation.local import WithLocalVariables
from fed_learn.simulation.network import Network
from fed_learn.weights import FrozenDict, WeightDict


@dataclass(frozen=True, eq=False)
class Demo:
    """A job that is ready to run.

    Attributes:
        server: The server.
        clients: The clients.
        split: The data they work on.
        networks: What the clients train, in turn; the first is also the server's. None given: the perceptron.
    """

    server: FederatedServer
    clients: tuple[FederatedClient, ...]
    split: Split
    networks: tuple[Network, ...] = ()

    def __post_init__(self) -> None:
        if not self.networks:
            object.__setattr__(self, "networks", networks("numpy", Dataset.DIGITS, self.split, seed=0))

    @property
    def frameworks(self) -> Mapping[str, str]:
        """Client → the framework it trains in."""
        count = len(self.networks)
        return FrozenDict({c.name: self.networks[i % count].framework for i, c in enumerate(self.clients)})

    def run(self) -> JobResult:
        """Runs the job; clients train side by side, each on one BLAS thread, which also keeps the bits the same."""
        with ExitStack() as threads:
            threads.enter_context(_one_blas_thread())
            for network in self.networks:
                threads.enter_context(network.one_thread())
            return self.server.run(self.clients)

    def test(self, weights: WeightDict) -> dict[str, float]:
        """Accuracy and loss on the test part, which nothing else has seen."""
        return self.networks[0].score(weights, self.split.test)


def build_demo(
    dataset: str = "digits",
    *,
    framework: str = "numpy",
    num_clients: int = 4,
    num_rounds: int = 20,
    alpha: float = 0.5,
    seed: int = 0,
    local_epochs: int = 5,
    kind: Kind = Kind.FULL,
    handlers: Sequence[EventHandler] | None = None,
    reporters: Sequence[EventHandler] = (),
    client_handlers: Callable[[str], Sequence[EventHandler]] = lambda name: (),
    client_filters: Callable[[int], Sequence[Any]] = lambda number: (),
    configured_handlers: Sequence[Any] | None = None,
    resume: bool = False,
    **server_arguments: Any,
) -> Demo:
    """Puts a demo job together.

    Args:
        dataset: `"digits"` or `"breast-cancer"`.
        framework: In what the clients train: `"numpy"` (a perceptron), `"torch"`, `"tensorflow"`, `"jax"` (the same
            network with BatchNorm in each, convolutional for images), or `"mixed"`: clients with torch and with
            TensorFlow in turn, in one job.
        num_clients: Clients, named `site-1`, `site-2` ….
        num_rounds: Rounds.
        alpha: How alike the clients' data are (see `load_split`).
        seed: Of the split, the initial weights and the training.
        local_epochs: Passes over a client's data in a round.
        kind: Contribute full weights or differences.
        handlers: The server's handlers; None: model selection and server validation.
        reporters: Further handlers, after those.
        client_handlers: Gives a client's handlers by its name.
        client_filters: Gives a client's filters by its number, from 0 (see `FederatedClient`).
        configured_handlers: The server's handlers as `{"path" | "name", "args"}` entries, in place of `handlers`; a
            class that takes an `evaluator` gets the demo's where the entry names none.
        resume: Go on with the job whose state is in `durable`, one of the `server_arguments`, which must be those that
            the job had.
        **server_arguments: Passed on to `FederatedServer` (`min_contributions=`, `kernel=`, …).

    Raises:
        ImportError: scikit-learn (extra `demo`) or the framework is not installed.
        ValueError: An argument is out of its range.
        ConfigError: A configured handler cannot be built.

    Example:
        >>> demo = build_demo(num_clients=2, num_rounds=1)
        >>> [client.name for client in demo.clients], len(demo.split.test)
        (['site-1', 'site-2'], 359)
    """
    split = load_split(dataset, num_clients, alpha, seed)
    kinds = networks(framework, dataset, split, seed)
    evaluator = kinds[0].evaluator(split.server)
    if configured_handlers is not None:
        chosen: Sequence[EventHandler] = [_configured(entry, evaluator) for entry in configured_handlers]
    elif handlers is not None:
        chosen = handlers
    else:
        chosen = [ModelSelectionHandler(), ServerValidationHandler(evaluator, num_rounds_per_valid=1)]
    server = FederatedServer(
        kinds[0].init(), num_rounds=num_rounds, handlers=[*chosen, *reporters], kind=kind, **server_arguments
    )
    if resume:
        code = {name: server_arguments[name] for name in ("aggregator", "kernel") if name in server_arguments}
        server = FederatedServer.resume(
            server_arguments["durable"], handlers=server.handlers, num_rounds=num_rounds, **code
        )
    clients = []
    for i, (train, selection) in enumerate(zip(split.train, split.selection, strict=True)):
        name = f"site-{i + 1}"
        network = kinds[i % len(kinds)]
        learner = network.learner(train, selection, local_epochs=local_epochs, seed=seed * 1000 + i)
        if "local" in server.settings.aggregation.policies.values():
            learner = WithLocalVariables(learner, server.weights)
        clients.append(
            FederatedClient(name, learner, handlers=client_handlers(name), kind=kind, filters=client_filters(i))
        )
    return Demo(server, tuple(clients), split, kinds)


def _configured(entry: Any, evaluator: ModelEvaluator) -> EventHandler:
    known = {
        name: getattr(builtin_handlers, name)
        for name in builtin_handlers.__all__
        if name.endswith("Handler") and name != "Handler"
    }
    handler: EventHandler = build_component(entry, known, {"evaluator": evaluator}, role="handler")
    return handler


def _one_blas_thread() -> AbstractContextManager[Any]:
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # comes with scikit-learn, but nothing depends on it
        return nullcontext()
    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits
