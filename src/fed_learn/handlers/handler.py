"""`Handler`, the base of everything that acts on the events of a federated job (the API of Clara Train 3.1)."""

from typing import Any, ClassVar

from fed_learn.events import EventType, fire_event
from fed_learn.model_meta import ContextKey, FLContext

__all__ = ["Handler", "ServerHandler", "fire_event"]

CLIENT_EVENTS = (
    EventType.GET_MODEL,
    EventType.RECEIVE_MODEL,
    EventType.SUBMIT_LOCAL_BEST_MODEL,
    EventType.SEND_BEST_MODEL,
    EventType.RECEIVE_VALIDATION_MODEL,
    EventType.SEND_VALIDATION_RESULTS,
)


class Handler:
    """Acts on events: override the methods of the events that matter to you; the others do nothing.

    A handler is a transaction on the context: if it raises, `rollback` is called and the context is put back as it
    was, so a half-done handler leaves no trace (see `fire_event`). So it is if it takes a key of the library out of a
    job's context, or binds to it what does not belong there (see `fed_learn.model_meta.JobContext`). The library hands
    out read-only arrays and tuples; to change something, bind a new value.

    Keep constructor arguments as attributes of the same names: stacks export handlers as path + args.

    What a handler binds in the context is kept with the state of a durable job, if it is a plain value, an array or a
    record of the library. A handler that remembers something else hands it over by `get_state`.

    Example:
        >>> from fed_learn import EventType
        >>> class Recorder(Handler):
        ...     def handle_event(self, event, ctx):
        ...         print(event)
        ...         super().handle_event(event, ctx)
        >>> fire_event(EventType.END_ROUND, [Recorder()], FLContext())
        _endRound
    """

    METHODS: ClassVar[dict[str, str]] = {
        EventType.STARTUP: "startup",
        EventType.SHUTDOWN: "shutdown",
        EventType.CLIENT_REGISTER: "client_register",
        EventType.CLIENT_QUIT: "client_quit",
        EventType.START_ROUND: "start_round",
        EventType.END_ROUND: "end_round",
        EventType.SEND_MODEL: "send_global_model",
        EventType.RECEIVE_CONTRIBUTION: "receive_contribution",
        EventType.BEFORE_AGGREGATION: "before_aggregation",
        EventType.END_AGGREGATION: "after_aggregation",
        EventType.RECEIVE_VALIDATION_RESULTS: "receive_validation_results",
        EventType.GET_MODEL: "request_model",
        EventType.RECEIVE_MODEL: "receive_model",
        EventType.SUBMIT_LOCAL_BEST_MODEL: "submit_local_best_model",
        EventType.SEND_BEST_MODEL: "send_best_model",
        EventType.RECEIVE_VALIDATION_MODEL: "receive_validation_models",
        EventType.SEND_VALIDATION_RESULTS: "send_validation_results",
    }
    """Event → the name of its method."""

    def handle_event(self, event: str, ctx: FLContext) -> None:
        """Calls the method of the event; an event without one is ignored.

        Args:
            event: One of `EventType`, or any other string.
            ctx: The job context.
        """
        method = self.METHODS.get(event)
        if method is not None:
            getattr(self, method)(ctx)

    def rollback(self, ctx: FLContext) -> None:
        """Called when this handler raised, before its bindings in the context are undone.

        Undo here what the context does not hold: the handler's own attributes, files.
        """

    def get_state(self) -> Any:
        """What this handler needs to go on in another process, asked for after each round of a durable job.

        Returns:
            None: nothing. Else what `fed_learn.durable.values` can store: numbers, text, bytes, arrays, lists, tuples
            and dicts of these.
        """
        return None

    def set_state(self, state: Any) -> None:
        """Takes back what `get_state` gave, after `startup`, in a job that goes on."""
        raise NotImplementedError(f"{type(self).__name__} has get_state, and no set_state")

    def startup(self, ctx: FLContext) -> None:
        """The job begins. In list order: what earlier handlers put into the context is there."""

    def shutdown(self, ctx: FLContext) -> None:
        """The job is over. In reverse order: the handlers before this one in the list are still up."""

    # Server.

    def client_register(self, ctx: FLContext) -> None:
        """Server: a client (`ContextKey.CONTRIBUTOR`) has joined."""

    def client_quit(self, ctx: FLContext) -> None:
        """Server: a client (`ContextKey.CONTRIBUTOR`) has left, at the end or because it failed."""

    def start_round(self, ctx: FLContext) -> None:
        """Server: a round (`ContextKey.ROUND`) begins."""

    def end_round(self, ctx: FLContext) -> None:
        """Server: the round is over; `ContextKey.REPORT` says what happened."""

    def send_global_model(self, ctx: FLContext) -> None:
        """Server: the global model is about to go to a client (`ContextKey.CONTRIBUTOR`)."""

    def receive_contribution(self, ctx: FLContext) -> None:
        """Server: `ContextKey.CONTRIBUTION` has come; `ContextKey.REJECTION` says why it was refused, or None."""

    def before_aggregation(self, ctx: FLContext) -> None:
        """Server: `ContextKey.CONTRIBUTIONS` are about to be averaged; the model is the one the clients received."""

    def after_aggregation(self, ctx: FLContext) -> None:
        """Server (END_AGGREGATION): the model in the context is the new global model."""

    def receive_validation_results(self, ctx: FLContext) -> None:
        """Server: a client's results on the model in the context, the last of `ContextKey.VALIDATION_RESULTS`."""

    # Client.

    def request_model(self, ctx: FLContext) -> None:
        """Client (GET_MODEL): it is about to ask the server for the global model."""

    def receive_model(self, ctx: FLContext) -> None:
        """Client: the global model has come and is in the context."""

    def submit_local_best_model(self, ctx: FLContext) -> None:
        """Client: its best local model, in the context, is about to be offered to the server."""

    def send_best_model(self, ctx: FLContext) -> None:
        """Client: its best local model goes to the server."""

    def receive_validation_models(self, ctx: FLContext) -> None:
        """Client (RECEIVE_VALIDATION_MODEL): a model to validate has come and is in the context."""

    def send_validation_results(self, ctx: FLContext) -> None:
        """Client: its result on the model in the context, `ContextKey.VALIDATION_RESULTS`, goes to the server."""


class ServerHandler(Handler):
    """A handler that acts on events of a server alone: on a client it would do nothing, and says so when it starts."""

    def startup(self, ctx: FLContext) -> None:
        """Refuses to start in a job on a client.

        Raises:
            ValueError: The job's context is that of a client.
        """
        methods = ("handle_event", *(self.METHODS[event] for event in CLIENT_EVENTS))
        if ContextKey.CONTRIBUTOR in ctx and all(getattr(type(self), m) is getattr(Handler, m) for m in methods):
            raise ValueError(
                f"{type(self).__name__} acts on events of a server, which the client {ctx[ContextKey.CONTRIBUTOR]!r} "
                "does not have: it belongs into the handlers= of the server"
            )
