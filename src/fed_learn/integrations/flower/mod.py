"""`ClientMod`: what our server wants to know of a client, and the client's own handlers, around any `ClientApp`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fed_learn.aggregation.differences import difference
from fed_learn.arguments import check_choice
from fed_learn.components.direction import MODES
from fed_learn.components.returned import scores_of
from fed_learn.contribution import INITIAL_VALIDATION_METRIC, Kind, ValidationResult, check_contributor
from fed_learn.errors import brief
from fed_learn.events import EventHandler, EventType, check_handlers, fire_event, shut_down
from fed_learn.integrations.flower.records import to_record, to_weights
from fed_learn.integrations.flower.replies import (
    METADATA,
    PARTITION_ID,
    SCORE_ONLY,
    SCORES,
    metrics_of,
    partition_name,
    records_of,
    states,
)
from fed_learn.model_meta import ContextKey, FLContext, JobContext, ModelData
from fed_learn.weights import FrozenWeights

logger = logging.getLogger("flwr")

FLOWER_CONTEXT = "flower_context"
"""The prop of the client's context that holds Flower's `Context`: what lasts between messages goes into its `state`."""

Validate = Callable[[FrozenWeights, Context], Mapping[str, Any] | float]


class ClientMod:
    """A mod of Flower's `ClientApp`, which stays as it is: `ClientApp(mods=[ClientMod(...)])`.

    A reply to a training message gets the contributor's name, its round and kind in a `ConfigRecord` of its own and,
    with `validate`, the scores of the model that was received: as `initial_<name>`, the one to select by also as
    `initial_validation_metric`. So does a reply to an evaluation. The record says too which metric that is, and what
    is better of it, which the server follows unless it was told something itself. The number of local iterations is
    what the app's own `MetricRecord` holds as `"num-iterations"`. Where our server asks for the score of the final
    model alone, the mod answers from `validate`, and the app is not called: it needs no evaluation of its own.

    Handlers see the client's events: STARTUP, GET_MODEL, RECEIVE_MODEL, SHUTDOWN around training, and
    RECEIVE_VALIDATION_MODEL, SEND_VALIDATION_RESULTS around an evaluation; a model that they put into the context is
    what the app trains or evaluates. Flower runs a `ClientApp` anew for each message, so handlers start and end with
    it: what must last belongs into the `state` of the `Context`, in the prop `FLOWER_CONTEXT`.

    Args:
        handlers: The client's handlers.
        validate: Scores weights on data that is not trained on: gives a dict of names to numbers of any kind, or the
            one number to select by.
        validation_metric: The score to select by, where `validate` gives several.
        validation_mode: What is better of it, `"max"` or `"min"`; None: its name says so.
        name: Gives the contributor's name, which must be the same in every run; None: `partition-<id>` of the node's
            configuration, where it says so. One that cannot be a name (`fed_learn.contribution.check_contributor`) is
            an error before the node trains.
        kind: `Kind.DIFF` sends the difference to what was received, in the place of the trained weights.
        arrayrecord_key: Where the message holds the model.

    Raises:
        TypeError: A handler lacks `handle_event` or `rollback`.
        ValueError: For another `validation_mode` or `kind`.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp(mods=[ClientMod(validate=lambda weights, context: {"accuracy": 0.9})])
    """

    def __init__(
        self,
        *,
        handlers: Sequence[EventHandler] = (),
        validate: Validate | None = None,
        validation_metric: str = "accuracy",
        validation_mode: str | None = None,
        name: Callable[[Context], str] | None = None,
        kind: Kind = Kind.FULL,
        arrayrecord_key: str = "arrays",
    ) -> None:
        self.handlers = check_handlers(handlers)
        self.validate = validate
        self.validation_metric = validation_metric
        if validation_mode is not None:
            check_choice("validation_mode", validation_mode, MODES)
        self.validation_mode = validation_mode
        self.name = name
        self.kind = Kind(kind)
        self.arrayrecord_key = arrayrecord_key
        self._left_out: set[str] = set()

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Around one message; those that bring no model pass as they are.

        Raises:
            HandlerError: A handler raised; Flower reports it to the server.
            MetricError: `validate` does not give the metric to select by.
            TypeError: It gives something else than scores.
        """
        around = {MessageType.TRAIN: self._train, MessageType.EVALUATE: self._evaluate}
        run = around.get(message.metadata.message_type.split(".")[0])
        if states(message.content, SCORE_ONLY):
            run, call_next = self._evaluate, self.evaluate
        if run is None or self.arrayrecord_key not in records_of(message.content, ArrayRecord):
            return call_next(message, context)
        ctx = JobContext({FLOWER_CONTEXT: context, ContextKey.HANDLERS: self.handlers})
        name, number = self._name(context), _round_of(message)
        ctx.set_props(
            {
                key: value
                for key, value in ((ContextKey.CONTRIBUTOR, name), (ContextKey.ROUND, number))
                if value is not None
            }
        )
        fire_event(EventType.STARTUP, self.handlers, ctx)
        try:
            return run(message, context, call_next, ctx)
        finally:
            shut_down(self.handlers, ctx, of_client=True)

    def evaluate(self, message: Message, context: Context) -> Message:
        """An evaluation for apps that have none, from `validate` alone: `app.evaluate()(mod.evaluate)`.

        Weighs all clients alike. The mod itself adds the scores.
        """
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    def _train(self, message: Message, context: Context, call_next: ClientAppCallable, ctx: FLContext) -> Message:
        fire_event(EventType.GET_MODEL, self.handlers, ctx)
        received = self._weights(message)
        model = self._with_model(message, received, EventType.RECEIVE_MODEL, ctx)
        scores = self._scores(model, context)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        content = reply.content
        if self.kind is Kind.DIFF:
            for key, record in records_of(content, ArrayRecord).items():
                content[key] = to_record(difference(to_weights(record, like=received), received))
        stated = {
            "contributor": self._name(context),
            "round": ctx.get_prop(ContextKey.ROUND),
            "kind": str(self.kind),
            SCORES: True if self.validate is not None else None,
            **self._stated(),
        }
        content[METADATA] = ConfigRecord({key: value for key, value in stated.items() if value is not None})
        _add(content, scores)
        return reply

    def _evaluate(self, message: Message, context: Context, call_next: ClientAppCallable, ctx: FLContext) -> Message:
        model = self._with_model(message, self._weights(message), EventType.RECEIVE_VALIDATION_MODEL, ctx)
        scores = self._scores(model, context)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        name = self._name(context)
        stated: dict[str, Any] = {"contributor": name, **self._stated()}
        stated = {key: value for key, value in stated.items() if value is not None}
        if stated:
            reply.content[METADATA] = ConfigRecord(stated)
        _add(reply.content, scores)
        metrics = {key: float(value) for key, value in metrics_of(reply.content).items()}
        ctx.set_prop(ContextKey.VALIDATION_RESULTS, (ValidationResult(name or "", "global", metrics),))
        fire_event(EventType.SEND_VALIDATION_RESULTS, self.handlers, ctx)
        return reply

    def _stated(self) -> dict[str, str | None]:
        """What the mod says of the score to select by."""
        if self.validate is None:
            return {}
        return {"metric": self.validation_metric, "mode": self.validation_mode}

    def _name(self, context: Context) -> str | None:
        if self.name is not None:
            return check_contributor(self.name(context))  # before it trains for what the server would refuse
        partition = context.node_config.get(PARTITION_ID)
        return None if partition is None else partition_name(partition)

    def _weights(self, message: Message) -> FrozenWeights:
        return to_weights(records_of(message.content, ArrayRecord)[self.arrayrecord_key])

    def _with_model(self, message: Message, weights: FrozenWeights, event: str, ctx: FLContext) -> FrozenWeights:
        """The weights as the handlers leave them, in the message too."""
        ctx.set_model(ModelData(weights))
        fire_event(event, self.handlers, ctx)
        model: Any = ctx.get_model()
        if model.weights is not weights:
            message.content[self.arrayrecord_key] = to_record(model.weights)
        return FrozenWeights(model.weights)

    def _scores(self, weights: FrozenWeights, context: Context) -> dict[str, float]:
        if self.validate is None:
            return {}
        scores, others = scores_of(
            self.validate(weights, context),
            self.validation_metric,
            "ClientMod: validate",
            "ClientMod(validation_metric=)",
        )
        for key, value in others.items():
            if key not in self._left_out:
                self._left_out.add(key)
                logger.warning("ClientMod: %r of validate is no number and is left out: %s", key, brief(value))
        named = {f"initial_{key}": value for key, value in scores.items()}
        return {**named, INITIAL_VALIDATION_METRIC: scores[self.validation_metric]}


def _round_of(message: Message) -> int | None:
    """The round from 0: our server's messages state it, Flower's in their configuration."""
    group: Any = message.metadata.group_id
    for config in records_of(message.content, ConfigRecord).values():
        group = config.get("server-round", group)
    return int(group) - 1 if str(group).isdecimal() else None


def _add(content: RecordDict, scores: dict[str, float]) -> None:
    """Into the app's `MetricRecord`, for Flower's strategies take one; or one of their own."""
    if not scores:
        return
    records = records_of(content, MetricRecord)
    key = next(iter(records), "metrics")
    content[key] = MetricRecord({**records.get(key, {}), **scores})
