"""`FederatedServer`: the server's side of a job, from the first event to the last."""

from collections.abc import Sequence
from contextlib import closing

from fed_learn import kernels
from fed_learn.aggregation.round import check_partial
from fed_learn.aggregation.tensors import without_tensors
from fed_learn.client.fed_client import FederatedClient
from fed_learn.contribution import Kind
from fed_learn.events import EventHandler, check_handlers
from fed_learn.handlers.scoring import check_choice, check_count
from fed_learn.model_meta import FLContext
from fed_learn.server.job import Job
from fed_learn.server.model_aggregator import Aggregator, check_aggregator
from fed_learn.server.result import JobResult
from fed_learn.server.roster import Roster, declared_score
from fed_learn.server.rounds import run_job
from fed_learn.weights import (
    FrozenWeights,
    Schema,
    WeightDict,
    as_weight_dict,
    check_differences,
    check_finite,
    finite_elements,
    size_text,
)


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
            contributions of the first round tell.
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
        kernel: Name of the kernel; None: the current one, looked up now.
        aggregator: Makes the global model in place of the weighted mean; needs `kind=Kind.DIFF`. A round in which it
            raises, or leaves no model of the job's schema, fails like one with too few contributions.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: A handler lacks `handle_event` or `rollback`, an aggregator `process`, or a count is not an int.
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
        stream: bool = False,
        partial: str = "same",
        kernel: str | None = None,
        aggregator: Aggregator | None = None,
    ) -> None:
        self.num_rounds = check_count("num_rounds", num_rounds)
        if min_contributions is not None:
            min_contributions = check_count("min_contributions", min_contributions)
        check_choice("on_bad_contribution", on_bad_contribution, ("raise", "reject"))
        check_choice("on_handler_error", on_handler_error, ("raise", "log"))
        arrays = as_weight_dict(without_tensors(weights, "global model"), "global model")
        self.schema = Schema.of(arrays, "global model")
        check_partial(partial, stream)
        if Kind(kind) is Kind.DIFF:
            check_differences(self.schema, "global model")
            if not arrays:
                raise ValueError("differences need a global model to be added to, and this one is empty")
        if not any(finite_elements(array).any() for array in arrays.values() if array.size):
            check_finite(arrays, "global model")
        if aggregator is not None:
            if Kind(kind) is not Kind.DIFF:
                raise ValueError("an aggregator works on differences: pass kind=Kind.DIFF, to the clients too")
            if exact or stream:
                raise ValueError("exact and stream belong to the weighted mean, which an aggregator replaces")
            if partial == "average":
                raise ValueError("partial='average' belongs to the weighted mean, which an aggregator replaces")
        self.aggregator = None if aggregator is None else check_aggregator(aggregator)
        self.weights = FrozenWeights(arrays)
        self.handlers = check_handlers(handlers)
        self.kind = Kind(kind)
        self.min_contributions = min_contributions
        self.on_bad_contribution = on_bad_contribution
        self.on_handler_error = on_handler_error
        self.exact = exact
        self.stream = stream
        self.partial = partial
        self.kernel = kernels.resolve(kernel).name
        self.ctx = FLContext()

    def run(self, clients: Sequence[FederatedClient], *, max_workers: int | None = None) -> JobResult:
        """Runs a job to its end.

        Args:
            clients: The clients, with different names.
            max_workers: How many clients work at the same time; None: as many as there are processors.

        Raises:
            ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
            HandlerError: A handler raised, with `on_handler_error="raise"`; or one could not start.
            TooFewContributionsError: Fewer clients are left than `min_contributions`.
            NothingAggregatedError: No round made a new global model, whatever `on_bad_contribution` says.
            ValueError: Two clients have one name, or there are fewer than `min_contributions`, or none; or their
                learners disagree by which metric models are selected, or which direction of it is better.

        Any `FedLearnError` that ends the job has what the job achieved so far, a `JobResult`, as its `result`.
        """
        with closing(Roster(clients, max_workers)) as roster:
            if self.min_contributions is not None and self.min_contributions > len(roster):
                raise ValueError(f"min_contributions is {self.min_contributions}, but there are {len(roster)} clients")
            metric, mode = declared_score(roster.learners())
            with self.begin(len(roster), validation_metric=metric, mode=mode) as job:
                try:
                    run_job(job, roster)
                finally:
                    roster.stop(job.record_late)
            return job.result()

    def begin(
        self, num_clients: int | None = None, *, validation_metric: str | None = None, mode: str | None = None
    ) -> Job:
        """STARTUP of a job whose messages something else carries: another stack, a loop of one's own.

        Args:
            num_clients: How many contributions a round needs if `min_contributions` is None; None: one of each client
                that was sent the model.
            validation_metric: Name of the metric by which models are selected, which contributions hold as
                `initial_validation_metric`; None: it has no other.
            mode: What is better of it, `"max"` or `"min"`, which handlers follow; None: its name says so.

        Raises:
            HandlerError: A handler could not start, such as one that was told another mode; those before it have been
                shut down.
            ValueError: `mode` is another word.
        """
        job = Job(self, num_clients)
        job.declare_score(validation_metric, mode)
        job.start()
        return job

    def __repr__(self) -> str:
        names = ", ".join(type(handler).__name__ for handler in self.handlers)
        return f"FederatedServer({size_text(self.weights)}, num_rounds={self.num_rounds}, handlers=[{names}])"
