"""Aggregators for NVFlare: of `FLModel`s, as its `FedAvg` asks for them, and of DXOs, as `ScatterAndGather` does."""

import copy
import logging
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.aggregators.weighted_aggregation_helper import AggregationStatsKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fed_learn.aggregation.plan import check_fitting
from fed_learn.aggregation.round import UNUSABLE, Round
from fed_learn.aggregation.rules import Rule
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.aggregation.tensors import label_of
from fed_learn.aggregation.told import Told
from fed_learn.contribution import Contribution, Kind, RoundReport, check_aggregation_weight, check_factor
from fed_learn.errors import (
    AggregationWeightError,
    AggregatorError,
    BrokenAccumulatorError,
    ClientQuitError,
    ContributionError,
    ExactDomainError,
    FedLearnError,
    FloatingPointEnvironmentError,
    NamesError,
    WeightsTypeError,
    as_failure,
    brief,
    described,
    text_of,
)
from fed_learn.integrations.nvflare import props
from fed_learn.limits import LEFT_OUT
from fed_learn.policies import Policies
from fed_learn.server.job_events import nothing_aggregated
from fed_learn.values import mean_of, whole_number_of
from fed_learn.weights import items_of

logger = logging.getLogger(__name__)

KINDS = {DataKind.WEIGHTS: Kind.FULL, DataKind.WEIGHT_DIFF: Kind.DIFF}
"""NVFlare's word → ours."""


class _Averaging:
    """What the two aggregators share: settings, the round, and what they read from NVFlare's events."""

    def __init__(
        self,
        exclude_vars: str | None = None,
        aggregation_weights: dict[str, float] | None = None,
        expected_data_kind: str = DataKind.WEIGHTS,
        weigh_by_local_iter: bool = True,
        *,
        on_bad_contribution: str = "reject",
        min_contributions: int = 1,
        require_weight: bool = False,
        partial: str = "same",
        policies: dict[str, str] | None = None,
        exact: bool = False,
        kernel: str | None = None,
        rule: str | Rule = "mean",
        stream: bool = False,
    ) -> None:
        super().__init__()
        if expected_data_kind not in tuple(KINDS):
            raise ValueError(
                f"expected_data_kind must be one of {[k.value for k in KINDS]}, not {expected_data_kind!r}"
            )
        self._settings = AggregationSettings(
            rule=rule,
            kind=KINDS[expected_data_kind],
            partial=partial,
            policies=Policies(policies),
            exact=exact,
            stream=stream,
            kernel=kernel,
            min_contributions=min_contributions,
            on_bad_contribution=on_bad_contribution,
        )
        if self._settings.how.makes_model:
            name = self._settings.how.name
            raise ValueError(f"rule {name!r} makes the new global model itself, which NVFlare makes of the average")
        for name, weight in (aggregation_weights or {}).items():
            try:
                check_factor(weight, name)
            except AggregationWeightError as error:
                raise ValueError(f"aggregation_weights: {error}") from error
        try:
            self._excluded = re.compile(exclude_vars) if exclude_vars else None
        except (re.error, TypeError) as error:
            raise ValueError(f"exclude_vars {exclude_vars!r} is no regular expression: {error}") from error
        self.exclude_vars = exclude_vars
        self.aggregation_weights = aggregation_weights
        self.expected_data_kind = DataKind(expected_data_kind)
        self.weigh_by_local_iter = weigh_by_local_iter
        self.on_bad_contribution = on_bad_contribution
        self.min_contributions = min_contributions
        self.require_weight = require_weight
        self.partial = partial
        self.policies = policies
        self.exact = exact
        self.kernel = kernel
        self.rule = rule
        self.stream = stream
        self.report: RoundReport | None = None
        self.fl_ctx: FLContext | None = None
        self._lock = threading.Lock()
        self._round: int | None = None
        self._global: dict[str, Any] | None = None
        self._skipped: frozenset[str] = frozenset()
        self._begun_round: Round | None = None
        self._told = Told(logger)
        self._reports: list[RoundReport] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Reads the round and the global model from NVFlare's events. Averages do without where there are none.

        At the end of a workflow in which no round was aggregated, the job is ended with an error.
        """
        super().handle_event(event_type, fl_ctx)  # type: ignore[misc] # of NVFlare's class beside this one
        if event_type == EventType.START_RUN:
            self._reports, self._told = [], Told(logger)
        elif event_type == EventType.END_WORKFLOW:
            error = nothing_aggregated(self._reports)
            if error is not None and not fl_ctx.get_prop(FLContextKey.FATAL_SYSTEM_ERROR):
                self.system_panic(text_of(error), fl_ctx)  # type: ignore[attr-defined] # of NVFlare's class
        elif event_type == AppEventType.ROUND_STARTED:
            self._learn_round(fl_ctx)
            self._global = props.global_weights(fl_ctx)
            self._begun_round = None
        elif event_type == AppEventType.BEFORE_TRAIN_TASK and self._global is None:
            # A workflow that was given its model has it nowhere else in the first round.
            self._global = FLModelUtils.from_shareable(fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE)).params or None
        elif event_type in (AppEventType.BEFORE_CONTRIBUTION_ACCEPT, AppEventType.BEFORE_AGGREGATION):
            self.fl_ctx = fl_ctx
            self._learn_round(fl_ctx)

    def _learn_round(self, fl_ctx: FLContext) -> None:
        """Reads the round from a context that states one; a new round drops the contributions of another."""
        number = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        with self._lock:
            if number is not None and number != self._round:
                self._round, self._begun_round = number, None

    def _clear(self) -> None:
        with self._lock:
            self._begun_round = None

    def _begun(self) -> Round:
        """The round that is under way.

        Raises:
            FedLearnError: Nothing of the global model is left to be averaged.
        """
        if self._begun_round is None:
            self._skipped = self._matched(self._global or ())
            if self._global and len(self._skipped) == len(self._global):
                raise FedLearnError(f"exclude_vars {self.exclude_vars!r} matches all variables of the global model")
            model = None if self._global is None else self._averaged_part(self._global, "the global model")
            check_fitting(self._settings.policies, self._global)
            self._begun_round = Round(self._settings, number=self._round, model=model, own=False, told=self._told)
        return self._begun_round

    def _matched(self, names: Iterable[Any]) -> frozenset[str]:
        """The names of the global model, or of a mean, that `exclude_vars` matches.

        A user's pattern may be slow on names made for that, so it never sees a client's names before all checks.
        """
        if self._excluded is None:
            return frozenset()
        return frozenset(name for name in names if isinstance(name, str) and self._excluded.search(name))

    def _averaged_part(self, weights: Any, who: Any) -> Any:
        """Weights without the excluded variables; what is no dict is left for the checks to refuse."""
        if not self._skipped or not isinstance(weights, Mapping):
            return weights
        return {name: value for name, value in items_of(weights, label_of(who)).items() if name not in self._skipped}

    def _receive(self, who: Any, read: Callable[[], Contribution]) -> None:
        """Accepts what a client sent, or refuses it.

        Args:
            who: The client.
            read: Makes a contribution of what it sent, which is not to be trusted.

        Raises:
            ContributionError, ExactDomainError: It is refused.
        """
        with self._lock:
            this = self._begun()
            sent: Contribution | None = None
            refusal: Exception | None = None
            try:
                sent = read()
                sent = this.receive(sent)
            except (AggregatorError, BrokenAccumulatorError, FloatingPointEnvironmentError):
                raise  # not the client's doing
            except BaseException as error:  # noqa: BLE001 - raised below, with the name of who sent it
                reason = _reason(who, as_failure(error))
                if self._excluded is not None and isinstance(reason, NamesError) and reason.extra:
                    advice = "exclude_vars is for variables that the global model has, and clients must not send others"
                    reason.args = (f"{reason}; {advice}",)
                refusal = this.refuse(who, copy.copy(reason))  # the traceback of what is raised keeps weights alive
                raise reason from (None if reason is error else error)
            finally:
                self.report = this.report
                if self.fl_ctx is not None:
                    outcome = props.Outcome(sent and sent.without_weights(), refusal, self._settle)
                    props.put(self.fl_ctx, props.OUTCOME, outcome)

    def _read(
        self, who: Any, weights: Any, kind: Any, number: Any, metrics: Any, meta: Mapping[str, Any]
    ) -> Contribution:
        """The contribution that a client sent, with all that NVFlare tells about it.

        Raises:
            ContributionError: Its number of steps is bad, or its weights are not plain.
        """
        algorithm, steps = meta.get(MetaKey.PROCESSED_ALGORITHM), meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND)
        if algorithm is not None:
            raise WeightsTypeError(
                f"{who}: weights are processed by {brief(algorithm)}, such as encrypted; only plain ones are averaged",
                contributor=who,
            )
        weight = (self.aggregation_weights or {}).get(who, 1.0)
        if self.weigh_by_local_iter:
            weight *= self._steps(who, steps)
        numbers, others = props.split(metrics)
        self._tell_of_metrics(
            who, numbers, {name: metrics.get(name, others[name]) for name in others if name != LEFT_OUT}
        )
        return Contribution(
            who,
            self._averaged_part(weights, who),
            weight,
            n_iter=whole_number_of(steps),
            round=number,
            kind=KINDS.get(kind, kind),
            metrics=numbers,
            info=others,
        )

    def _tell_of_metrics(self, who: Any, numbers: Mapping[str, float], others: Mapping[str, Any]) -> None:
        """Logs once for each client and metric that the metric is left out of the mean."""
        for name, value in others.items():
            self._told.once(
                ("metric", who, name),
                f"{who}: metric {brief(name)} is {brief(value)}, no single number: it is left out of the mean metrics",
            )
        for name, value in numbers.items():
            if not math.isfinite(value):
                self._told.once(
                    ("metric", who, name), f"{who}: metric {brief(name)} is {value}: it is left out of the mean metrics"
                )

    def _steps(self, who: Any, steps: Any) -> float:
        """The number of steps by which a client counts; one that sends none counts by 1, as NVFlare counts it.

        Raises:
            AggregationWeightError: It is no number, negative or not finite; or there is none, with `require_weight`.
        """
        if steps is not None:
            return check_aggregation_weight(steps, who)
        lacks = (
            f"{who}: meta lacks {str(MetaKey.NUM_STEPS_CURRENT_ROUND)!r}, the number of steps by which it would count"
        )
        if self.require_weight:
            raise AggregationWeightError(
                f"{lacks}; with weigh_by_local_iter=False all clients count equally", contributor=who, value=None
            )
        self._told.once((who, "steps"), f"{lacks}: counted by 1, as NVFlare does (require_weight=True refuses it)")
        return 1.0

    def _settle(self) -> list[tuple[str, Exception]]:
        """Closes the round: refuses those that cannot be averaged with the others, and returns who that is and why.

        Calling it again does nothing more.
        """
        with self._lock:
            return self._settle_begun()

    def _settle_begun(self) -> list[tuple[str, Exception]]:
        this = self._begun()
        refused = [(sent.contributor, this.refuse(sent.contributor, copy.copy(error))) for sent, error in this.close()]
        for _, error in refused:
            logger.error("refused: %s", error)
        return refused

    def _average(self) -> tuple[dict[str, Any] | None, dict[str, float], RoundReport]:
        """The mean of the round, None if the round fails; the metrics; the report.

        Raises:
            ContributionError, ExactDomainError: One was refused, with `on_bad_contribution="raise"`.
            FedLearnError: Variables are excluded, and their values in the global model are not known.
        """
        with self._lock:
            self._settle_begun()
            this, self._begun_round = self._begun(), None
            if this.rejected and self.on_bad_contribution == "raise":
                raise this.rejected[0].error
            only = None if self.fl_ctx is None else props.taken(self.fl_ctx, props.CONTRIBUTORS)
            chosen = [one for name, one in sorted(this.accepted.items()) if only is None or name in only]
            mean = self._combined(this, chosen)
            if mean is not None and self._global is None:
                self._skipped = self._matched(mean)
                mean = {name: value for name, value in mean.items() if name not in self._skipped}
            self.report = report = this.report
            self._reports.append(report)
            if report.error is not None:
                logger.error("%s", report.error)
            if self.fl_ctx is not None:
                props.put(self.fl_ctx, props.REPORT, report)
                props.put(self.fl_ctx, AppConstants.AGGREGATION_STATS, self._stats(report, mean or {}))
            if mean is None:
                return None, {}, report
            if self.expected_data_kind == DataKind.WEIGHTS:
                mean = self._completed(mean)
            return mean, _mean_metrics(chosen), report

    def _combined(self, this: Round, chosen: Sequence[Contribution]) -> dict[str, Any] | None:
        """Some of the contributions, combined; None if the round fails: its report says why."""
        names = [one.contributor for one in chosen]
        error: Exception | None = this.too_few(len(names), self.min_contributions, len(this.accepted) - len(names))
        if error is not None:
            this.fail(error, names)
            return None
        try:
            combined = this.combine(chosen)
        except UNUSABLE as unusable:
            this.fail(unusable)
            return None
        made = {**combined.constants, **combined.mean}
        return {name: made[name] for name in combined.sent if name in made}

    def _completed(self, mean: dict[str, Any]) -> dict[str, Any]:
        """The mean with all other variables of the global model, since NVFlare takes it for the new global model."""
        if self._global is not None:
            return mean if len(mean) == len(self._global) else {**self._global, **mean}
        if self._skipped:
            raise FedLearnError(
                f"exclude_vars leaves {min(self._skipped)!r} as it is in the global model, "
                "which this workflow has not shown to the aggregator"
            )
        return mean

    def _stats(self, report: RoundReport, mean: Mapping[str, Any]) -> dict[str, Any]:
        """What NVFlare's own reports tell of a round."""
        return {
            AggregationStatsKey.ROUND: report.round,
            AggregationStatsKey.ACCEPTED_CONTRIBUTIONS: len(report.accepted),
            AggregationStatsKey.CONTRIBUTORS: list(report.accepted),
            AggregationStatsKey.KEYS_AGGREGATED: len(mean),
            AggregationStatsKey.KEYS_SEEN: len(mean) + len(self._skipped),
            AggregationStatsKey.FULLY_MATCHED_KEYS: len(mean),
            AggregationStatsKey.PARTIALLY_MATCHED_KEYS: 0,
            AggregationStatsKey.SKIPPED_KEYS: len(self._skipped),
        }


class WeightedAverageAggregator(_Averaging, ModelAggregator):  # type: ignore[misc] # NVFlare has no type information
    """Averages `FLModel`s: the `aggregator=` of NVFlare's `FedAvg` and of the recipes built on it.

    Each model is checked whole before any of it counts, against the global model: names, shapes, dtypes, NaN and
    infinity, round, number of steps, a second contribution. One that fails is refused by an exception that names client
    and cause, which NVFlare logs; the others are averaged (see `fed_learn.weighted_average`). A client counts by
    `meta["NUM_STEPS_CURRENT_ROUND"]` times its entry of `aggregation_weights`; one that sends no number of steps counts
    by 1, as in NVFlare, and 0 steps add nothing. Dtypes stay, and tensors stay tensors. Each metric is averaged too,
    over the clients that sent a finite number for it, by the same weights, bools as 0 and 1; whatever else is sent as a
    metric is left out, and the log says so once.

    If a round fails, because too few contributions were accepted or the mean left the range of a dtype, an error is
    logged and the global model stands.

    Args:
        exclude_vars: Regular expression: variables of the global model with a match are not averaged, nor checked, and
            it keeps its own. Where the workflow has not shown it to the aggregator they are checked and left out of
            the average.
        aggregation_weights: Client → factor; 1 for those not named.
        expected_data_kind: `"WEIGHTS"` for models, `"WEIGHT_DIFF"` for differences (`ParamsType.DIFF`).
        weigh_by_local_iter: Weigh by steps; otherwise by `aggregation_weights` alone.
        on_bad_contribution: `"reject"` goes on without a refused contribution; `"raise"` ends the job when the round in
            which there was one is to be averaged.
        min_contributions: Accepted contributions that a round needs.
        require_weight: Refuse clients that send no number of steps, rather than count them by 1.
        partial: What becomes of models that hold a part of the variables. `"same"`: a part that is the same from all is
            averaged, and the global model keeps the rest; of different parts the commonest counts. `"average"`: each
            variable is averaged over those who sent it, as NVFlare does (not with `stream`). `"refuse"`: it is refused.
        policies: What becomes of variables by regular expressions of their names, the first that is found deciding:
            `{"bn": "local"}` for FedBN; see `fed_learn.policies.Policy`. The global model keeps its own of what is
            `"local"`, which NVFlare sends all the same: clients do not load it. Codes are `"same"`; all others are
            averaged.
        exact: Exact sums (see `fed_learn.weighted_average`).
        kernel: Name of the kernel; None: the current one.
        rule: How contributions are combined: the name of a rule, one of `fed_learn.rules.available()`, or a `Rule`.
        stream: Add each model to float64 sums as it comes, in order of arrival, and keep none. Otherwise the models are
            kept until the round is over and added in the order of the clients' names: the same bits whichever is first,
            in one pass, but in the memory of all of them. What is handed over must then be left as it is, as NVFlare
            leaves it.

    Raises:
        ValueError: An argument is out of its range.
        KernelNameError, KernelUnavailableError: The kernel cannot be used.

    Attributes:
        report: The `RoundReport` of the round so far, or of the last one.

    Example:
        >>> import numpy as np
        >>> aggregator = WeightedAverageAggregator()
        >>> for name, w, steps in ("site-1", 0.0, 3), ("site-2", 4.0, 1):
        ...     meta = {"client_name": name, "NUM_STEPS_CURRENT_ROUND": steps}
        ...     aggregator.accept_model(FLModel(params={"w": np.full(2, w, np.float32)}, meta=meta))
        >>> aggregator.aggregate_model().params, aggregator.report.accepted
        ({'w': array([1., 1.], dtype=float32)}, ('site-1', 'site-2'))
    """

    def accept_model(self, model: FLModel) -> None:
        """Accepts a model from a client, `meta["client_name"]`, where NVFlare's workflows put its authenticated name.

        Raises:
            ContributionError, ExactDomainError: It is refused.
        """
        meta = model.meta or {}
        kind = DataKind.WEIGHT_DIFF if model.params_type == ParamsType.DIFF else DataKind.WEIGHTS
        who = meta.get("client_name")
        self._receive(who, lambda: self._read(who, model.params, kind, model.current_round, model.metrics, meta))

    def aggregate_model(self) -> FLModel:
        """The average of the accepted models, or an empty difference if the round fails.

        Raises:
            ContributionError, ExactDomainError: A model was refused, with `on_bad_contribution="raise"`.
        """
        mean, metrics, report = self._average()
        full = mean is not None and self.expected_data_kind == DataKind.WEIGHTS
        return FLModel(
            params_type=ParamsType.FULL if full else ParamsType.DIFF,
            params={} if mean is None else mean,
            metrics=metrics or None,
            current_round=report.round if report.round >= 0 else None,
            meta={"nr_aggregated": len(report.accepted), "current_round": report.round},
        )

    def reset_stats(self) -> None:
        """Forgets the contributions so far."""
        self._clear()


class WeightedAverageDXOAggregator(_Averaging, Aggregator):  # type: ignore[misc]
    """Averages shareables that hold a DXO: the aggregator of NVFlare's `ScatterAndGather`, by its component id.

    It has the arguments of `WeightedAverageAggregator` and does the same, but it expects differences
    (`expected_data_kind="WEIGHT_DIFF"`), as NVFlare's `InTimeAccumulateWeightedAggregator` does, and `accept` returns
    False for what is refused. Collections of DXOs are refused.

    Example:
        >>> import numpy as np
        >>> aggregator = WeightedAverageDXOAggregator()
        >>> def update(name, step, steps):
        ...     meta = {"NUM_STEPS_CURRENT_ROUND": steps}
        ...     sent = DXO(DataKind.WEIGHT_DIFF, {"w": np.full(2, step)}, meta).to_shareable()
        ...     sent.set_peer_props({ReservedKey.IDENTITY_NAME: name})
        ...     return sent
        >>> [aggregator.accept(update("site-1", 1.0, steps), FLContext()) for steps in (10, 20)]
        [True, False]
        >>> from_shareable(aggregator.aggregate(FLContext())).data, aggregator.report.rejected[0].cause
        ({'w': array([1., 1.])}, 'DuplicateContributionError')
    """

    def __init__(
        self,
        exclude_vars: str | None = None,
        aggregation_weights: dict[str, float] | None = None,
        expected_data_kind: str = DataKind.WEIGHT_DIFF,
        weigh_by_local_iter: bool = True,
        *,
        on_bad_contribution: str = "reject",
        min_contributions: int = 1,
        require_weight: bool = False,
        partial: str = "same",
        policies: dict[str, str] | None = None,
        exact: bool = False,
        kernel: str | None = None,
        rule: str | Rule = "mean",
        stream: bool = False,
    ) -> None:
        super().__init__(
            exclude_vars,
            aggregation_weights,
            expected_data_kind,
            weigh_by_local_iter,
            on_bad_contribution=on_bad_contribution,
            min_contributions=min_contributions,
            require_weight=require_weight,
            partial=partial,
            policies=policies,
            exact=exact,
            kernel=kernel,
            rule=rule,
            stream=stream,
        )

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Accepts what a client sent, or refuses it: logs why, and returns False."""
        self.fl_ctx = fl_ctx
        self._learn_round(fl_ctx)
        who = props.sender(shareable, shareable.get_peer_prop(ReservedKey.IDENTITY_NAME, None))
        code = shareable.get_return_code()
        if code and code != ReturnCode.OK:
            failure = ClientQuitError(f"{who}: sent no contribution: {code}", contributor=who)
            with self._lock:
                this = self._begun()
                this.refuse(who, copy.copy(failure))
                self.report = this.report
            self.log_warning(fl_ctx, str(failure), fire_event=False)
            return False

        def read() -> Contribution:
            dxo, number = from_shareable(shareable), shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND)
            metrics = dxo.meta.get(MetaKey.INITIAL_METRICS)
            return self._read(who, dxo.data, dxo.data_kind, number, metrics, dxo.meta)

        try:
            self._receive(who, read)
        except (ContributionError, ExactDomainError) as error:
            self.log_error(fl_ctx, f"refused: {text_of(error)}", fire_event=False)
            return False
        return True

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """The average of what was accepted, or an empty difference if the round fails.

        Raises:
            ContributionError, ExactDomainError: Something was refused, with `on_bad_contribution="raise"`.
        """
        self.fl_ctx = fl_ctx
        mean, _, _ = self._average()
        kind = DataKind.WEIGHT_DIFF if mean is None else self.expected_data_kind
        return DXO(kind, {} if mean is None else mean).to_shareable()

    def reset(self, fl_ctx: FLContext) -> None:
        """Forgets the contributions so far."""
        self.fl_ctx = fl_ctx
        self._clear()


def _mean_metrics(contributions: Iterable[Contribution]) -> dict[str, float]:
    """The weighted mean of each metric over the contributions that count and have a finite number for it."""
    numbers: dict[str, list[float]] = {}
    weights: dict[str, list[float]] = {}
    for contribution in contributions:
        if contribution.aggregation_weight:
            for metric, value in contribution.metrics.items():
                if math.isfinite(value):
                    numbers.setdefault(metric, []).append(value)
                    weights.setdefault(metric, []).append(contribution.aggregation_weight)
    return {metric: mean_of(values, weights[metric]) for metric, values in numbers.items()}


def _reason(who: Any, error: Exception) -> Exception:
    """Why a contribution is refused, as an error that names who sent it."""
    if isinstance(error, ContributionError | ExactDomainError):
        return error
    label = label_of(who)
    return WeightsTypeError(f"{label}: sent something unreadable: {described(error)}", contributor=label)
