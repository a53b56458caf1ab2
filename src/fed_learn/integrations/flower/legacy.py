"""`LegacyFedAvg` in the place of `flwr.server.strategy.FedAvg`, for apps that have not moved to the Message API."""

import logging
import math
import operator
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from flwr.app import Array
from flwr.common import EvaluateRes, FitIns, FitRes, Parameters
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg as FlowerFedAvg

from fed_learn.aggregation.rules import LoraRule, Rule
from fed_learn.aggregation.told import Told
from fed_learn.contribution import INITIAL_VALIDATION_METRIC, Contribution, Kind, check_aggregation_weight
from fed_learn.errors import AggregationWeightError, ClientQuitError, ContributionError, brief, described
from fed_learn.events import EventHandler, check_handlers
from fed_learn.integrations.flower.flower_job import FlowerJob
from fed_learn.integrations.flower.names import NodeNames
from fed_learn.integrations.flower.records import NPY, to_weights
from fed_learn.integrations.flower.replies import (
    N_ITER,
    PARTITION_ID,
    Place,
    node_name,
    partition_name,
)
from fed_learn.integrations.flower.strategy_base import StrategyBase
from fed_learn.server import JobResult
from fed_learn.server.settings import JobSettings
from fed_learn.values import mean_of, number_of, whole_number_of
from fed_learn.weights import FrozenWeights, Schema

logger = logging.getLogger("flwr")

Failures: TypeAlias = "list[tuple[ClientProxy, Any] | BaseException]"
Metrics: TypeAlias = dict[str, Any]


class LegacyFedAvg(StrategyBase, FlowerFedAvg):
    """Federated averaging with our checks, sums and handlers, behind Flower's older interface.

    Parameters have no names there: variables are `"0"`, `"1"`, … A contributor is named by the `"partition-id"` among
    its metrics, or else by Flower's client id, which is another one in every run.

    `aggregate_fit` may be called without `configure_fit`, with anything and in any order, as Flower's may: the first
    result that can be read then stands for the global model.

    Flower does not tell a strategy when a job is over. With `num_rounds` it ends with the evaluation of that round, or
    with its training if `fraction_evaluate` is 0; else call `close()`.

    The other arguments are those of `fed_learn.integrations.flower.FedAvg`.

    Args:
        num_rounds: As of Flower's `ServerConfig`.
        partial: As of `FedAvg`; a shorter list of parameters is the beginning of the longer one.
        policies: As of `FedAvg`, but `"local"`: of a list without names nobody could tell what is left out of it.
        rule: As of `FedAvg`, but `"lora"`, which needs names.
        node_names: As of `FedAvg`, by Flower's client ids.
        **flower: Arguments of Flower's `FedAvg`.

    Attributes:
        job: The `Job` that runs or ran last; None before the first. Not in copies and pickles of the strategy.

    Example:
        >>> LegacyFedAvg(fraction_fit=0.5)
        LegacyFedAvg(accept_failures=True)
    """

    def __init__(
        self,
        *,
        num_rounds: int | None = None,
        handlers: Sequence[EventHandler] = (),
        kind: Kind = Kind.FULL,
        min_contributions: int = 1,
        on_bad_contribution: str = "reject",
        on_handler_error: str = "raise",
        partial: str = "same",
        policies: Mapping[str, str] | None = None,
        exact: bool = False,
        kernel: str | None = None,
        rule: str | Rule = "mean",
        validation_metric: str = INITIAL_VALIDATION_METRIC,
        validation_mode: str | None = None,
        n_iter_key: str = N_ITER,
        node_names: NodeNames | None = None,
        **flower: Any,
    ) -> None:
        super().__init__(**flower)
        self.num_rounds = num_rounds
        self.handlers = check_handlers(handlers)
        self.kind = kind
        self.min_contributions = min_contributions
        self.on_bad_contribution = on_bad_contribution
        self.on_handler_error = on_handler_error
        self.exact = exact
        self.kernel = kernel
        self.rule = rule
        self.partial = partial
        self.policies = policies
        self.validation_metric = validation_metric
        self.validation_mode = validation_mode
        self.n_iter_key = n_iter_key
        self.node_names = node_names
        if "local" in (policies or {}).values():
            raise ValueError(
                "policies: 'local' variables are left out of messages, and parameters have no names here by which a "
                "client could tell which are left; use 'keep', or fed_learn.integrations.flower.FedAvg"
            )
        if rule == LoraRule.name or isinstance(rule, LoraRule):
            raise ValueError(
                "rule 'lora' finds the factors of adapters by their names, and parameters have none here: use "
                "fed_learn.integrations.flower.FedAvg"
            )
        self._job_check()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(accept_failures={self.accept_failures})"

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """START_ROUND, which may replace the global model; Flower's instructions; SEND_MODEL for each client.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
            ContributionError: `parameters`, or what a handler put in their place, are no model.
        """
        running = self._job_open(
            server_round, lambda running: _holds(running, parameters), lambda schema: _weights(parameters, schema)
        )
        running.names.connected = client_manager.all
        instructions = super().configure_fit(server_round, _parameters(running), client_manager)
        for client, _ in instructions:
            running.ask(_node(client, 0))
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
        running = self._job_for(server_round, results, lambda: _readable(results))
        if running is None:
            for failure in failures:
                logger.warning("\t> %s", _failure(failure, 0)[1])
            return None, {}
        by_name: dict[str, FitRes] = {}
        try:
            placed = [(_node(client, place), result) for place, (client, result) in enumerate(results, 1)]
            if not running.job.schema:
                running.widths.note(_readable(results))
            running.names.expect((node, _claim(node, result.metrics)) for node, result in placed)
            read = [self.__read(running, node, result) for node, result in placed]
            running.job.foresee([given for _, given in read])
            for (node, result), (name, given) in zip(placed, read, strict=True):
                contribution = running.receive(node, name, given)
                if contribution is not None:
                    by_name[contribution.contributor] = result
            errors = [_failure(failure, place) for place, failure in enumerate(failures, len(results) + 1)]
            for node, error in errors:
                logger.warning("\t> %s", error)
                if node is not None:
                    running.fail(node, error)
            running.lose([error for node, error in errors if node is None])
            changed = running.close_round(error=errors[0][1] if errors and not self.accept_failures else None)
        except BaseException:
            running.forget_round()
            raise
        report = running.report
        assert report is not None
        metrics: Metrics = {}
        accepted = [by_name[name] for name in report.accepted if name in by_name]
        if accepted and report.error is None:
            if self.fit_metrics_aggregation_fn is not None:
                metrics = self.fit_metrics_aggregation_fn([(r.num_examples, r.metrics) for r in accepted])
            elif server_round == 1:
                logger.warning("No fit_metrics_aggregation_fn provided")
        sent = _parameters(running) if changed else None
        if server_round == self.num_rounds and self.fraction_evaluate == 0.0:
            self.close()
        return sent, metrics

    def aggregate_evaluate(
        self, server_round: int, results: list[tuple[ClientProxy, EvaluateRes]], failures: Failures
    ) -> tuple[float | None, Metrics]:
        """The mean loss over the clients that have examples and a loss that is finite; the others are told of.

        The scores serve the selection of models, those of the last round for the final one.
        """
        running = self._job_running
        if running is not None and server_round == self.num_rounds:
            self.close(results)
        elif running is not None:
            for place, (client, result) in enumerate(results, 1):
                score = number_of(self.__scored(result.metrics).get(INITIAL_VALIDATION_METRIC))
                node = _node(client, place)
                if score is not None:
                    running.note_score(node, partial(_claim, node, result.metrics), score)
        told = Told(logger) if running is None else running.told
        counted: list[tuple[ClientProxy, EvaluateRes]] = []
        losses: list[tuple[float, float]] = []
        for place, (client, result) in enumerate(results, 1):
            node = _node(client, place)
            who = node_name(node) if running is None else running.names.called(node)
            try:
                weight = check_aggregation_weight(result.num_examples)
            except AggregationWeightError as error:
                told.once(("evaluation", who), f"{who}: its evaluation is left out: {error}")
                continue
            if not weight:
                continue
            counted.append((client, result))
            loss = number_of(result.loss)
            if loss is not None and math.isfinite(loss):
                losses.append((loss, weight))
            else:
                told.once(
                    ("metric", who, "loss"), f"{who}: its loss is {brief(result.loss)}, left out of the mean loss"
                )
        # Flower's own mean loss would be NaN where one is; it decides whether there is one.
        safe = [(client, replace(result, loss=0.0)) for client, result in counted]
        aggregated, metrics = super().aggregate_evaluate(server_round, safe, failures)
        mean = mean_of(*zip(*losses, strict=True)) if aggregated is not None and losses else None
        return mean, metrics

    def close(self, results: list[tuple[ClientProxy, EvaluateRes]] | None = None) -> JobResult | None:
        """CLIENT_QUIT and SHUTDOWN; nothing if no job runs.

        Args:
            results: Of the last evaluation, by which the final model is scored.
        """
        running, self._job_running = self._job_running, None
        if running is None:
            return None
        with running.job:
            running.begin_final()
            for place, (client, result) in enumerate(results or (), 1):
                metrics, node = self.__scored(result.metrics), _node(client, place)
                if INITIAL_VALIDATION_METRIC in metrics:
                    running.receive_final(node, partial(_claim, node, result.metrics), partial(_own_metrics, metrics))
            running.finish()
        return running.job.result()

    def _job_settings(self, num_rounds: int | None) -> JobSettings:
        return super()._job_settings(self.num_rounds)

    def __read(self, running: FlowerJob, node: Hashable, result: FitRes) -> tuple[str, Contribution | Exception]:

        def read(name: str) -> Contribution:
            metrics = _own_metrics(result.metrics)
            return Contribution(
                name,
                _weights(result.parameters, running.job.schema, name),
                result.num_examples,
                n_iter=whole_number_of(metrics.get(self.n_iter_key)),
                kind=self.kind,
                metrics=running.selection.with_score(name, metrics),
            )

        return running.read(node, partial(_claim, node, result.metrics), read)

    def __scored(self, metrics: Metrics) -> Metrics:
        """The metrics, the one to select by under the name that handlers know."""
        if self.validation_metric not in metrics:
            return metrics
        return {INITIAL_VALIDATION_METRIC: metrics[self.validation_metric], **metrics}


def _node(client: ClientProxy, place: int) -> Hashable:
    """What tells clients apart: their id; where a test has made up a client without one, its place."""
    return client.cid if isinstance(client.cid, str) else Place(place)


def _parameters(running: FlowerJob) -> Parameters:
    """The global model as Flower's older interface has it: the bytes of the record."""
    return Parameters([array.data for array in running.model.record.values()], NPY)


def _holds(running: FlowerJob, parameters: Parameters) -> bool:
    """Whether these are the global model, unchanged."""
    own = [array.data for array in running.model.record.values()]
    return len(own) == len(parameters.tensors) and all(map(operator.is_, own, parameters.tensors))


def _readable(results: Sequence[tuple[ClientProxy, FitRes]]) -> Iterator[FrozenWeights]:
    """The weights of those results that can be read, for want of a global model."""
    for _, result in results:
        try:
            yield _weights(result.parameters)
        except ContributionError:  # to be refused with its reason where it is received
            continue


def _weights(parameters: Parameters, schema: Schema | None = None, contributor: str | None = None) -> FrozenWeights:
    tensors = enumerate(parameters.tensors)
    return to_weights({str(i): Array("", (), NPY, data) for i, data in tensors}, like=schema, contributor=contributor)


def _own_metrics(metrics: Metrics) -> Metrics:
    return {key: value for key, value in metrics.items() if key != PARTITION_ID}


def _claim(node: Hashable, metrics: Metrics) -> str | None:
    partition = whole_number_of(metrics.get(PARTITION_ID))
    return None if partition is None else partition_name(partition)


def _failure(failure: tuple[ClientProxy, Any] | BaseException, place: int) -> tuple[Hashable | None, ClientQuitError]:
    """A client that failed, and why: by an exception, which names no client, or with a status that says it."""
    if isinstance(failure, BaseException):
        return None, ClientQuitError(f"a client failed: {described(failure)}")
    client, result = failure
    node = _node(client, place)
    who = client.cid if node == client.cid else node_name(node)
    return node, ClientQuitError(f"{who}: {result.status.code.name}: {result.status.message}")
