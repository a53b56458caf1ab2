"""`LegacyFedAvg` in the place of `flwr.server.strategy.FedAvg`, for apps that have not moved to the Message API."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array
from flwr.common import EvaluateRes, FitIns, FitRes, Parameters
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg as FlowerFedAvg

from fed_learn.contribution import INITIAL_VALIDATION_METRIC, Contribution, Kind
from fed_learn.errors import ClientQuitError, ContributionError
from fed_learn.events import EventHandler, check_handlers
from fed_learn.integrations.flower.records import NPY, to_weights
from fed_learn.integrations.flower.replies import N_ITER, PARTITION_ID, checked_name, partition_name
from fed_learn.integrations.flower.session import Session
from fed_learn.server import JobResult
from fed_learn.server.job import Job
from fed_learn.weights import FrozenWeights, Schema

logger = logging.getLogger("flwr")

Failures: TypeAlias = "list[tuple[ClientProxy, Any] | BaseException]"
Metrics: TypeAlias = dict[str, Any]


class LegacyFedAvg(FlowerFedAvg):
    """Federated averaging with our checks, sums and handlers, behind Flower's older interface.

    Parameters have no names there: variables are `"0"`, `"1"`, … A contributor is named by the `"partition-id"` among
    its metrics, or else by Flower's client id, which is another one in every run.

    Flower does not tell a strategy when a job is over. With `num_rounds` it ends with the evaluation of that round, or
    with its training if `fraction_evaluate` is 0; else call `close()`.

    Args:
        num_rounds: As of Flower's `ServerConfig`.
        handlers: As of `fed_learn.integrations.flower.FedAvg`, like all but the last.
        kind: See there.
        min_contributions: See there; None: `min_fit_clients`.
        on_bad_contribution: See there.
        on_handler_error: See there.
        exact: See there.
        kernel: See there.
        validation_metric: See there.
        n_iter_key: See there.
        **flower: Arguments of Flower's `FedAvg`.

    Attributes:
        job: The `Job` that runs or ran last; None before the first.

    Example:
        >>> LegacyFedAvg(fraction_fit=0.5, min_contributions=1)
        LegacyFedAvg(accept_failures=True)
    """

    def __init__(
        self,
        *,
        num_rounds: int | None = None,
        handlers: Sequence[EventHandler] = (),
        kind: Kind = Kind.FULL,
        min_contributions: int | None = None,
        on_bad_contribution: str = "reject",
        on_handler_error: str = "raise",
        exact: bool = False,
        kernel: str | None = None,
        validation_metric: str = INITIAL_VALIDATION_METRIC,
        n_iter_key: str = N_ITER,
        **flower: Any,
    ) -> None:
        super().__init__(**flower)
        self.num_rounds = num_rounds
        self.handlers = check_handlers(handlers)
        self.kind = Kind(kind)
        self.min_contributions = min_contributions
        self.on_bad_contribution = on_bad_contribution
        self.on_handler_error = on_handler_error
        self.exact = exact
        self.kernel = kernel
        self.validation_metric = validation_metric
        self.n_iter_key = n_iter_key
        self.job: Job | None = None
        self._session: Session | None = None
        self._parameters: Parameters | None = None
        self._begin({"nothing": np.zeros(1)}, ())  # refuses what a job would refuse later

    def __repr__(self) -> str:
        return f"{type(self).__name__}(accept_failures={self.accept_failures})"

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """START_ROUND, which may replace the global model; Flower's instructions; SEND_MODEL for each client."""
        session = self._open(server_round, parameters)
        assert session is not None
        instructions = super().configure_fit(server_round, self._sent(session), client_manager)
        for client, _ in instructions:
            session.ask(client.cid)
        return instructions

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: Failures
    ) -> tuple[Parameters | None, Metrics]:
        """RECEIVE_CONTRIBUTION for each result; aggregation; END_ROUND.

        Returns:
            The new global model, None if it stands as it was; and what `fit_metrics_aggregation_fn` makes of the
            accepted contributions.

        Raises:
            ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        session = self._open(server_round, None, [result.parameters for _, result in results])
        if session is None:
            logger.error("round %d: no result can be read, and the global model is not known", server_round)
            return None, {}
        by_name: dict[str, FitRes] = {}
        for client, result in results:
            contribution = self._receive(session, client, result)
            if contribution is not None:
                by_name[contribution.contributor] = result
        errors = [_fail(session, failure) for failure in failures]
        changed = session.close_round(error=errors[0] if errors and not self.accept_failures else None)
        report = session.job.reports[-1]
        metrics: Metrics = {}
        if self.fit_metrics_aggregation_fn is not None and report.error is None:
            accepted = [by_name[name] for name in report.accepted if name in by_name]
            metrics = self.fit_metrics_aggregation_fn([(result.num_examples, result.metrics) for result in accepted])
        sent = self._sent(session) if changed else None
        if server_round == self.num_rounds and self.fraction_evaluate == 0.0:
            self.close()
        return sent, metrics

    def aggregate_evaluate(
        self, server_round: int, results: list[tuple[ClientProxy, EvaluateRes]], failures: Failures
    ) -> tuple[float | None, Metrics]:
        """Flower's mean loss, over the clients that have examples.

        The scores serve the selection of models, those of the last round for the final one.
        """
        session = self._session
        if session is not None and server_round == self.num_rounds:
            self.close(results)
        elif session is not None:
            for client, result in results:
                score = _numbers(self._scored(result.metrics)).get(INITIAL_VALIDATION_METRIC)
                if score is not None:
                    session.note_score(client.cid, partial(_claim, client, result.metrics), score)
        counted = [(client, result) for client, result in results if result.num_examples > 0]
        aggregated: tuple[float | None, Metrics] = super().aggregate_evaluate(server_round, counted, failures)
        return aggregated

    def close(self, results: list[tuple[ClientProxy, EvaluateRes]] | None = None) -> JobResult | None:
        """CLIENT_QUIT and SHUTDOWN; nothing if no job runs.

        Args:
            results: Of the last evaluation, by which the final model is scored.
        """
        session, self._session = self._session, None
        if session is None:
            return None
        with session.job:
            session.begin_final()
            for client, result in results or ():
                metrics = self._scored(result.metrics)
                if INITIAL_VALIDATION_METRIC in metrics:
                    claim = partial(_claim, client, result.metrics)
                    session.receive_final(client.cid, claim, partial(_numbers, metrics))
            session.finish()
        return session.job.result()

    def _begin(self, weights: Any, handlers: Sequence[EventHandler]) -> Session:
        least = max(1, self.min_fit_clients) if self.min_contributions is None else self.min_contributions
        return Session(
            weights,
            num_rounds=self.num_rounds,
            handlers=handlers,
            kind=self.kind,
            min_contributions=least,
            on_bad_contribution=self.on_bad_contribution,
            on_handler_error=self.on_handler_error,
            exact=self.exact,
            kernel=self.kernel,
        )

    def _open(
        self, server_round: int, parameters: Parameters | None, results: Sequence[Parameters] = ()
    ) -> Session | None:
        """The job, in this round; begins either if need be. None if there is no model to begin with."""
        if parameters is not None and self._session is not None and self._session.is_over(server_round):
            self.close()
        session, given = self._session, None
        if parameters is not None and parameters is not self._parameters:
            given = _weights(parameters, None if session is None else session.job.schema)
            if session is not None and Schema.of(given) != session.job.schema:
                self.close()  # another model: another job
                session = None
            if session is None:
                session, given = self._start(given), None
        if session is None:
            session = self._start_from(results)
        if session is not None and session.number != server_round - 1:
            session.start_round(server_round - 1, given)
        return session

    def _start(self, weights: FrozenWeights) -> Session:
        session = self._begin(weights, self.handlers)
        session.job.start()
        self._session, self.job = session, session.job
        return session

    def _start_from(self, results: Sequence[Parameters]) -> Session | None:
        """A job with the model of the first result that can be read."""
        for parameters in results if self.kind is Kind.FULL else ():
            try:
                return self._start(_weights(parameters))
            except ContributionError:  # it will be refused as a contribution too, with the reason
                continue
        return None

    def _sent(self, session: Session) -> Parameters:
        """The global model as Flower's older interface has it: the bytes of the record."""
        self._parameters = Parameters([array.data for array in session.record.values()], NPY)
        return self._parameters

    def _receive(self, session: Session, client: ClientProxy, result: FitRes) -> Contribution | None:
        def read(name: str) -> Contribution:
            metrics = _numbers(result.metrics)
            return Contribution(
                name,
                _weights(result.parameters, session.job.schema, name),
                result.num_examples,
                n_iter=metrics.get(self.n_iter_key),
                kind=self.kind,
                metrics=metrics,
            )

        return session.receive(client.cid, lambda: _claim(client, result.metrics), read)

    def _scored(self, metrics: Metrics) -> Metrics:
        """The metrics, the one to select by under the name that handlers know."""
        if self.validation_metric not in metrics:
            return metrics
        return {INITIAL_VALIDATION_METRIC: metrics[self.validation_metric], **metrics}


def _weights(parameters: Parameters, schema: Schema | None = None, contributor: str | None = None) -> FrozenWeights:
    tensors = enumerate(parameters.tensors)
    return to_weights({str(i): Array("", (), NPY, data) for i, data in tensors}, like=schema, contributor=contributor)


def _numbers(metrics: Metrics) -> Metrics:
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != PARTITION_ID
    }


def _claim(client: ClientProxy, metrics: Metrics) -> str | None:
    return checked_name(partition_name(metrics[PARTITION_ID]), client.cid) if PARTITION_ID in metrics else None


def _fail(session: Session, failure: tuple[ClientProxy, Any] | BaseException) -> ClientQuitError:
    """A client that failed: by an exception, which names no client, or with a status that says why."""
    if isinstance(failure, BaseException):
        unnamed = ClientQuitError(f"a client failed: {type(failure).__name__}: {failure}")
        logger.warning("\t> %s", unnamed)
        return unnamed
    client, result = failure
    error = ClientQuitError(f"{client.cid}: {result.status.code.name}: {result.status.message}")

    def read(_: str) -> Contribution:
        raise error

    session.receive(client.cid, lambda: None, read)
    return error
