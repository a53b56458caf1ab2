"""`FederatedServer`: the server's side of a job, from the first event to the last."""

from collections.abc import Sequence
from dataclasses import replace

from fed_learn import kernels
from fed_learn.aggregation.tensors import without_tensors
from fed_learn.client.fed_client import FederatedClient
from fed_learn.contribution import Kind
from fed_learn.errors import HandlerError
from fed_learn.events import EventHandler, EventType, check_handlers, fire_event
from fed_learn.handlers.scoring import check_count
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.server.job import Job
from fed_learn.server.result import JobResult
from fed_learn.server.roster import Roster
from fed_learn.server.rounds import run_round
from fed_learn.server.validation import cross_validate, score_final_model
from fed_learn.weights import FrozenWeights, Schema, WeightDict, as_weight_dict, check_differences, check_finite


class FederatedServer:
    """Runs a federated job with clients in this process, and fires every event on the way.

    Each round sends the global model to every client, checks what comes back, averages what is accepted in the order
    of the contributors' names, and makes that the global model. A client that raises, or quits, leaves the job, which
    goes on while enough are left. A round with too few accepted contributions fails: the report and the log say
    so, and the global model stands. Handlers replace the global model by `ctx.set_model` in START_ROUND,
    END_AGGREGATION or END_ROUND, and decide what is averaged by rebinding `CONTRIBUTIONS` in BEFORE_AGGREGATION.

    Args:
        weights: The initial global model; it sets names, shapes and dtypes for good. Copied.
        num_rounds: Rounds to run, at least 1.
        handlers: The server's handlers.
        kind: The kind of contributions that is expected.
        min_contributions: Accepted contributions that a round needs, and clients that a job needs to go on. None: all
            clients, the careful choice.
        on_bad_contribution: `"raise"` ends the job at the first refused contribution; `"reject"` goes on without it.
        on_handler_error: `"raise"` ends the job when a handler raised; `"log"` goes on. Both log and record it.
        exact: Average with exact sums (see `fed_learn.weighted_average`).
        kernel: Name of the kernel; None: the current one, looked up now.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: A handler lacks `handle_event` or `rollback`, or a count is not an int.
        ContributionError: `weights` is no weight dict, or holds dtypes or values that cannot be averaged.
        KernelNameError, KernelUnavailableError: The kernel cannot be used.

    Attributes:
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
        kernel: str | None = None,
    ) -> None:
        check_count("num_rounds", num_rounds)
        if min_contributions is not None:
            check_count("min_contributions", min_contributions)
        if on_bad_contribution not in ("raise", "reject"):
            raise ValueError(f"on_bad_contribution must be 'raise' or 'reject', not {on_bad_contribution!r}")
        if on_handler_error not in ("raise", "log"):
            raise ValueError(f"on_handler_error must be 'raise' or 'log', not {on_handler_error!r}")
        arrays = as_weight_dict(without_tensors(weights, "global model"), "global model")
        self.schema = Schema.of(arrays, "global model")
        if Kind(kind) is Kind.DIFF:
            check_differences(self.schema, "global model")
        check_finite(arrays, "global model")
        self.weights = FrozenWeights(arrays)
        self.num_rounds = num_rounds
        self.handlers = check_handlers(handlers)
        self.kind = Kind(kind)
        self.min_contributions = min_contributions
        self.on_bad_contribution = on_bad_contribution
        self.on_handler_error = on_handler_error
        self.exact = exact
        self.kernel = kernels.resolve(kernel).name
        self.ctx = FLContext()

    def run(self, clients: Sequence[FederatedClient], *, max_workers: int | None = None) -> JobResult:
        """Runs a job to its end.

        Args:
            clients: The clients, with different names.
            max_workers: How many clients work at the same time; None: as many as there are processors.

        Raises:
            ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
            HandlerError: A handler raised, with `on_handler_error="raise"`; or one could not start. If it was when all
                was done, at CLIENT_QUIT or SHUTDOWN, the error's `result` holds what this method would have returned.
            TooFewContributionsError: Fewer clients are left than `min_contributions`.
            ValueError: Two clients have one name, or there are fewer than `min_contributions`, or none.
        """
        roster = Roster(clients, max_workers)
        if self.min_contributions is not None and self.min_contributions > len(roster):
            roster.close()
            raise ValueError(f"min_contributions is {self.min_contributions}, but there are {len(roster)} clients")
        self.ctx = FLContext({ContextKey.NUM_ROUNDS: self.num_rounds})
        job = Job(self, roster, self.ctx)
        try:
            fire_event(EventType.STARTUP, self.handlers, self.ctx)
        except BaseException:
            roster.close()
            raise
        result: JobResult | None = None
        try:
            result = _run(job)
            job.unregister()
        except BaseException as error:
            failures = job.shut_down()
            for failure in failures:
                error.add_note(f"during shutdown: {failure}")
            if isinstance(error, HandlerError) and result is not None:
                error.result = replace(result, handler_failures=(*job.handler_failures, *failures))
            raise
        failures = job.shut_down()
        result = replace(result, handler_failures=(*job.handler_failures, *failures))
        if failures and self.on_handler_error == "raise":
            late = HandlerError(failures)
            late.result = result
            raise late
        return result


def _run(job: Job) -> JobResult:
    job.register()
    for number in range(job.server.num_rounds):
        run_round(job, number)
        if job.ctx.get_prop(ContextKey.STOP) is not None:
            break
    results = score_final_model(job)
    metrics = job.ctx[ContextKey.METRICS]
    cross_site, more = cross_validate(job)
    return JobResult(
        weights=job.weights,
        best=job.ctx.best_model,
        reports=tuple(job.reports),
        metrics=metrics,
        cross_site=cross_site,
        validation_results=(*results, *more),
        quits=tuple(job.quits),
        handler_failures=tuple(job.handler_failures),
        stop_reason=job.ctx.get_prop(ContextKey.STOP),
    )
