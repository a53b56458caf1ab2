"""`FederatedServer`: the server's side of a job, from the first event to the last."""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from fed_learn import kernels
from fed_learn.aggregation.rules import ClaraRule, Rule, available
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.client.fed_client import FederatedClient
from fed_learn.contribution import Kind
from fed_learn.durable import StateStore
from fed_learn.events import EventHandler
from fed_learn.model_meta import FLContext
from fed_learn.policies import Policies
from fed_learn.server.client_pool import ClientPool, declared_score
from fed_learn.server.durable_job import load_state
from fed_learn.server.job import Job
from fed_learn.server.model_aggregator import Aggregator
from fed_learn.server.result import JobResult
from fed_learn.server.rounds import run_job
from fed_learn.server.settings import JobSettings, initial_model
from fed_learn.weights import WeightDict, size_text


class FederatedServer:
    """Runs a federated job with clients in this process, and fires every event on the way.

    Each round sends the global model to every client, checks what comes back, averages what is accepted in the order
    of the contributors' names, and makes that the global model. A client that raises, or quits, leaves the job, which
    goes on while enough are left. A round with too few accepted contributions fails: the report and the log say
    so, and the global model stands. Handlers replace the global model by `ctx.set_model` in START_ROUND,
    END_AGGREGATION or END_ROUND, and decide what is averaged by rebinding `CONTRIBUTIONS` in BEFORE_AGGREGATION.

    Args:
        weights: The initial global model; it sets names, shapes and dtypes for good. Copied. Values that are not finite
            are constants, as in a mask of −inf: clients must send the same, and they are kept. An empty dict: the
            contributions of the first round set them.
        num_rounds: Rounds to run, at least 1.
        handlers: The server's handlers.
        kind: The kind of contributions that is expected.
        min_contributions: Accepted contributions that a round needs, and clients that a job needs to go on. None: all
            clients, the careful choice.
        on_bad_contribution: `"raise"` ends the job at the first refused contribution; `"reject"` goes on without it.
        on_handler_error: `"raise"` ends the job when a handler raised; `"log"` goes on. Both log and record it.
        exact: Average with exact sums (see `fed_learn.weighted_average`).
        stream: Add up contributions as they arrive, and keep none: the memory of one sum, whatever the number of
            clients. Sums are then taken in the order of arrival, and handlers see contributions without weights.
        partial: What becomes of contributions that hold a part of the variables. `"same"`: a part that is the same from
            all is averaged, and the rest of the global model kept; of different parts the commonest counts, and the
            others are refused. `"average"`: each variable is averaged over those who sent it (not with `stream`).
            `"refuse"`: a part is refused.
        policies: What becomes of variables by regular expressions of their names, the first that is found deciding:
            `{"bn": "local"}` for FedBN; see `fed_learn.policies.Policy`. Clients are not sent what is `"local"`, of
            which the global model keeps what it began with. Codes are `"same"`; all others are averaged.
        kernel: Name of the kernel; None: the current one, looked up now.
        rule: How contributions are combined: the name of a rule, one of `fed_learn.rules.available()`, or a `Rule`.
        aggregator: Makes the global model in place of the weighted mean; needs `kind=Kind.DIFF`. A round in which it
            raises, or leaves no model of the job's schema, fails like one with too few contributions.
        durable: A folder in which the state of the job is kept, written anew after each round: `resume` goes on with
            it, and ends with the same bytes, whenever the process was killed. It must hold no other job's. None: the
            job ends with its process.
        ledger: Write a chained record of each round to the folder: digests of every contribution and of the model
            before and after, settings, rule. `fed-learn verify` checks it; see `fed_learn.durable.ledger`.
        keep_contributions: Keep there also what rounds were made of, so that they can be made again and compared.

    Raises:
        ImportError: `durable` needs blake3 and safetensors (extra `durable`).
        ValueError: An argument is out of its range, or a policy fits no variable.
        TypeError: A handler lacks `handle_event` or `rollback`, an aggregator `process`, or a count is not an int.
        ContributionError: `weights` is no weight dict, or holds dtypes or values that cannot be averaged.
        KernelNameError, KernelUnavailableError: The kernel cannot be used.

    Attributes:
        settings: The settings of its jobs.
        weights: The initial global model.
        ctx: The server's context, of the job that runs or ran last.

    Example:
        >>> import numpy as np, fed_learn as fl
        >>> class Adder(fl.Learner):
        ...     def __init__(self, step):
        ...         self.step = step
        ...     def train(self, weights, ctx):
        ...         return fl.TrainingResult({"w": weights["w"] + self.step}, aggregation_weight=1)
        ...     def validate(self, weights, ctx):
        ...         return {"accuracy": 1.0}
        >>> server = FederatedServer({"w": np.zeros(2)}, num_rounds=3)
        >>> clients = [fl.FederatedClient("site-1", Adder(1)), fl.FederatedClient("site-2", Adder(3))]
        >>> server.run(clients).weights["w"]
        array([6., 6.])
    """

    def __init__(
        self,
        weights: WeightDict,
        *,
        num_rounds: int,
        handlers: Sequence[EventHandler] = (),
        kind: Kind = Kind.FULL,
        min_contributions: int | None = None,
        on_bad_contribution: str = "raise",
        on_handler_error: str = "raise",
        exact: bool = False,
        stream: bool = False,
        partial: str = "same",
        policies: Mapping[str, str] | None = None,
        kernel: str | None = None,
        rule: str | Rule = "mean",
        aggregator: Aggregator | None = None,
        durable: str | os.PathLike[str] | None = None,
        ledger: bool = False,
        keep_contributions: bool = False,
    ) -> None:
        if aggregator is not None and rule != "mean":
            raise ValueError("aggregator= is a rule of its own: give one of the two")
        aggregation = AggregationSettings(
            rule=rule if aggregator is None else ClaraRule(aggregator),
            kind=kind,
            partial=partial,
            policies=Policies(policies),
            exact=exact,
            stream=stream,
            kernel=kernels.resolve(kernel).name,
            min_contributions=min_contributions,
            on_bad_contribution=on_bad_contribution,
        )
        self.settings = JobSettings(
            num_rounds=num_rounds,
            handlers=handlers,
            on_handler_error=on_handler_error,
            aggregation=aggregation,
            durable=None if durable is None else Path(durable),
            ledger=ledger,
            keep_contributions=keep_contributions,
        )
        if durable is not None:
            StateStore(durable)  # better to hear now what is not installed
        self.weights = initial_model(weights, aggregation.kind, aggregation.policies)
        self.ctx = FLContext()
        self._state: Any = None

    @classmethod
    def resume(
        cls,
        durable: str | os.PathLike[str],
        *,
        handlers: Sequence[EventHandler] = (),
        num_rounds: int | None = None,
        min_contributions: int | None = None,
        rule: str | Rule | None = None,
        aggregator: Aggregator | None = None,
        kernel: str | None = None,
    ) -> Self:
        """The server of a job that goes on where its state ends; `run` or `begin` then do so.

        Settings, global model, best models and all that is remembered come from the folder. What is code does not: it
        has to be given again, and clients with the same names and the same learners; one that is not has left the job.
        A handler that hands over its state (`get_state`) gets it back; one that was not there begins anew.

        Args:
            durable: The folder.
            handlers: The handlers that the job had.
            num_rounds: How many rounds the job has; None: as before. A job that is done goes on if it gets more.
            min_contributions: Accepted contributions that a round needs, so that the job can go on with fewer clients;
                None: as before.
            rule: The rule, where it is one of your own.
            aggregator: The aggregator, where the job had one.
            kernel: Name of the kernel; None: the current one. All give the same bits.

        Raises:
            StateError: The folder holds no state that is whole.
            ValueError: The job had a rule or an aggregator that is not given, or `num_rounds` rounds are over already.

        Example:
            >>> import tempfile, numpy as np, fed_learn as fl
            >>> class Adder(fl.Learner):
            ...     def train(self, weights, ctx):
            ...         return fl.TrainingResult({"w": weights["w"] + 1}, aggregation_weight=1)
            ...     def validate(self, weights, ctx):
            ...         return {"accuracy": 1.0}
            >>> clients = [fl.FederatedClient("site-1", Adder())]
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     first = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=2, durable=folder).run(clients)
            ...     more = fl.FederatedServer.resume(folder, num_rounds=5).run(clients)
            >>> first.weights["w"], more.weights["w"], len(more.reports)
            (array([2.]), array([5.]), 5)
        """
        state = load_state(durable)
        kept: dict[str, Any] = dict(state["settings"])
        name = kept.pop("rule")
        if rule is None and aggregator is None:
            if name not in available():
                raise ValueError(
                    f"the job in {os.fspath(durable)} combines by {name!r}: give it as rule= or aggregator="
                )
            rule = name
        over = len(state["reports"])
        kept["num_rounds"] = num_rounds if num_rounds is not None else kept["num_rounds"]
        if min_contributions is not None:
            kept["min_contributions"] = min_contributions
        if kept["num_rounds"] < over:
            raise ValueError(f"num_rounds is {num_rounds}, and {over} rounds of the job are over")
        server = cls(
            state["model"],
            **kept,
            handlers=handlers,
            rule="mean" if rule is None else rule,
            aggregator=aggregator,
            kernel=kernel,
            durable=durable,
        )
        server._state = state
        return server

    @property
    def num_rounds(self) -> int:
        """Rounds to run."""
        assert self.settings.num_rounds is not None
        return self.settings.num_rounds

    @property
    def handlers(self) -> Sequence[EventHandler]:
        """The server's handlers."""
        return self.settings.handlers

    def run(
        self,
        clients: Sequence[FederatedClient],
        *,
        max_workers: int | None = None,
        cross_site: bool | str = True,
    ) -> JobResult:
        """Runs a job to its end.

        Args:
            clients: The clients, with different names.
            max_workers: How many clients work at the same time; None: as many as there are processors.
            cross_site: Which models all clients score at the end, beside the final one: True: the best of each client
                and of the job, which is clients × clients validations; `"best"`: that of the job; False: none. Clients
                look for and keep a best model of their own only where it is asked for.

        Raises:
            ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
            HandlerError: A handler raised, with `on_handler_error="raise"`; or one could not start.
            TooFewContributionsError: Fewer clients are left than `min_contributions`.
            NothingAggregatedError: No round made a new global model, whatever `on_bad_contribution` says.
            StateExistsError, StateError: As `begin`.
            ValueError: `cross_site` is another; two clients have one name, or there are fewer than `min_contributions`,
                or none; or their learners disagree by which metric models are selected, or which direction of it is
                better.

        Any `FedLearnError` that ends the job has what the job achieved so far, a `JobResult`, as its `result`.
        """
        if cross_site is not True and cross_site is not False and cross_site != "best":
            raise ValueError(f"cross_site must be True, False or 'best', not {cross_site!r}")
        required = self.settings.aggregation.min_contributions
        with closing(ClientPool(clients, max_workers)) as pool:
            if required is not None and required > len(pool):
                raise ValueError(f"min_contributions is {required}, but there are {len(pool)} clients")
            metric, mode = declared_score(pool.learners())
            with self.begin(len(pool), validation_metric=metric, mode=mode) as job:
                try:
                    run_job(job, pool, cross_site)
                finally:
                    pool.stop(job.record_late)
            return job.result()

    def begin(
        self, num_clients: int | None = None, *, validation_metric: str | None = None, mode: str | None = None
    ) -> Job:
        """STARTUP of a job that is driven by your own loop, or by another stack.

        Args:
            num_clients: How many contributions a round needs if `min_contributions` is None; None: one of each client
                that was sent the model.
            validation_metric: Name of the metric by which models are selected, which contributions hold as
                `initial_validation_metric`; None: it has no other.
            mode: Which of its values are better, `"max"` or `"min"`, for handlers to follow; None: its name decides.

        Raises:
            HandlerError: A handler could not start, such as one that was told another mode; those before it have been
                shut down.
            StateExistsError: The folder for the state holds that of another job.
            StateError: The state could not be written, or does not fit the handlers.
            ValueError: `mode` is another word.
        """
        job = Job(self.settings, self.weights, num_clients)
        self.ctx = job.ctx
        job.declare_score(validation_metric, mode)
        state, self._state = self._state, None
        job.start(state)
        return job

    def __repr__(self) -> str:
        names = ", ".join(type(handler).__name__ for handler in self.handlers)
        return f"FederatedServer({size_text(self.weights)}, num_rounds={self.num_rounds}, handlers=[{names}])"
