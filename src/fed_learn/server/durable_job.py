"""`DurableJob`: rounds whose state is kept in a folder, so that the job can go on after its process has ended."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from fed_learn.contribution import BestModel, ClientFailure, Contribution, RoundReport
from fed_learn.durable import StateStore, encoded
from fed_learn.durable.parts import give_all_back, give_back, state_of, states_of
from fed_learn.errors import FedLearnError, HandlerFailure, LedgerError, StateError, StateExistsError, a_type, described
from fed_learn.events import EventType
from fed_learn.model_meta import ContextKey
from fed_learn.server.job_ledger import JobLedger
from fed_learn.server.job_rounds import JobRounds
from fed_learn.server.settings import JobSettings, checked_model
from fed_learn.weights import FrozenWeights, WeightDict

logger = logging.getLogger(__name__)

_KEPT_KEYS = (ContextKey.BEST_RECEIVED, ContextKey.BEST_AGGREGATED, ContextKey.STOP)
"""Keys of the library in the context that outlive a round; the others are bound anew."""


class DurableJob(JobRounds):
    """The rounds of a job, whose state is written after each of them where the settings name a folder for it.

    The state is the global model, the best models, what handlers have put into the context, what handlers, rule,
    aggregator and clients hand over by `get_state`, and the record of what has happened. A job begins with the state
    after 0 rounds.

    Args:
        settings: The settings of the job.
        weights: The initial global model: see `initial_model`.
        num_clients: How many contributions a round needs if the settings say nothing.

    Attributes:
        states_of_clients: Gives what the clients hand over, by their names; None: there are no clients here.
        kept_of_clients: What they handed over in the job that this one goes on with.
        resumed: Whether this job goes on with one that another process began.
    """

    def __init__(self, settings: JobSettings, weights: WeightDict, num_clients: int | None = None) -> None:
        super().__init__(settings, weights, num_clients)
        self.states_of_clients: Callable[[], Mapping[str, Any]] | None = None
        self.kept_of_clients: Mapping[str, Any] = {}
        self.resumed = False
        self._store = StateStore(settings.durable) if settings.durable is not None else None
        self._ledger = JobLedger(settings) if settings.ledger else None
        self._back: set[str] = set()  # clients that have registered in the job that this one goes on with
        self._not_kept: set[str] = set()

    @property
    def next_round(self) -> int:
        """The number of the round with which the job begins, or goes on."""
        return self.reports[-1].round + 1 if self.reports else 0

    def register(self, name: str) -> None:
        """CLIENT_REGISTER: a client takes part from now on; not fired for one that has come back in a resumed job.

        Raises:
            UnknownContributorError: That cannot be the name of a client.
            HandlerError: A handler raised, with `on_handler_error="raise"`; so in every method that fires an event.
        """
        if name in self._back and name in self.clients:
            self._back.discard(name)
        else:
            super().register(name)

    def start_round(self, number: int, weights: WeightDict | None = None) -> None:
        """START_ROUND; as `JobRounds` says."""
        super().start_round(number, weights)
        if self._ledger is not None:
            ledger = self._ledger
            self._or_failure(lambda: ledger.begin(self._weights))

    def receive(self, name: str, sent: object) -> Contribution | None:
        """RECEIVE_CONTRIBUTION; as `JobRounds` says."""
        accepted = super().receive(name, sent)
        if self._ledger is not None and accepted is not None:
            assert isinstance(sent, Contribution)
            ledger, weights = self._ledger, sent.weights if accepted.weights is None else accepted.weights
            self._or_failure(lambda: ledger.note(accepted, weights, self.schema))
        return accepted

    def aggregate(self) -> bool:
        """BEFORE_AGGREGATION, the aggregation, END_AGGREGATION; as `JobRounds` says."""
        aggregated = super().aggregate()
        if not aggregated:
            self._note_aggregation(None)
        return aggregated

    def end_aggregation(self, weights: FrozenWeights) -> None:
        """END_AGGREGATION; as `JobRounds` says."""
        self._note_aggregation(weights)
        super().end_aggregation(weights)

    def _note_aggregation(self, weights: FrozenWeights | None) -> None:
        if self._ledger is not None:
            ledger, contributions = self._ledger, self.ctx[ContextKey.CONTRIBUTIONS]
            self._or_failure(lambda: ledger.close(contributions, weights, self.schema))

    def end_round(self) -> RoundReport:
        """END_ROUND; returns the report of the round. Then ledger and state are written, where they are to be kept.

        Raises:
            OutOfTurnError: No round has begun, or its contributions have not been aggregated.
            StateError: The state could not be written, with `on_handler_error="raise"`. The one before is still there.
        """
        report = super().end_round()
        self._or_failure(self._write_to_ledger)
        self.save()
        return report

    def save(self) -> None:
        """Writes the state as it is, where it is to be kept.

        Raises:
            StateError: It could not be written, with `on_handler_error="raise"`.
        """
        if self._store is not None:
            store = self._store
            self._or_failure(lambda: store.save(len(self.reports), self.get_state()))

    def begin_ledger(self) -> None:
        """Writes the first entry of the ledger, where there is one.

        Raises:
            StateError: It could not be written, with `on_handler_error="raise"`.
        """
        if self._ledger is not None:
            ledger = self._ledger
            self._or_failure(lambda: ledger.begin_job(self._weights))

    def _write_to_ledger(self) -> None:
        if self._ledger is not None:
            self._ledger.write(self.report, self._weights)

    def _or_failure(self, write: Callable[[], None]) -> None:
        """Writes something; a failure is one of the job, as that of a handler is."""
        try:
            write()
        except (OSError, StateError, LedgerError) as error:
            failure = StateError(
                f"the state after {len(self.reports)} rounds is not kept in {self._where}: {described(error)}",
                path=self._where,
            )
            failure.__cause__ = error
            logger.error("%s", failure)
            self.record([HandlerFailure(EventType.END_ROUND, "fed_learn.durable.StateStore", failure)])
            if self.on_handler_error == "raise":
                raise failure from error

    def open_store(self, state: Any = None) -> None:
        """Takes the folder of the state for this job.

        Args:
            state: The state that is expected there, which has been read; None: there must be none.

        Raises:
            StateError: The job has gone on since the state was read.
            StateExistsError: Another job has its state there, and this one does not go on with it.
            FileInUseError: Another process writes to it.
            OSError: It cannot be made, or written to.
        """
        if self._store is None:
            return
        check_free(self._store, state is not None)
        self._store.open()
        try:
            check_free(self._store, state is not None)  # once more: another job may have come and gone
            if state is not None and len(load_state(self._store.folder)["reports"]) != len(state["reports"]):
                raise StateError(f"{self._store.folder}: the job has gone on since its state was read: resume it again")
        except BaseException:
            self._store.close()
            raise

    def close_store(self) -> None:
        """Gives the folder up."""
        if self._store is not None:
            self._store.close()

    def get_state(self) -> dict[str, Any]:
        """What must outlive the process, as `fed_learn.durable.values` can store it.

        Raises:
            StateError: A handler or a client handed over what cannot be kept, or raised.
        """
        return {
            "settings": self.settings.kept(),
            "model": self._weights,
            "num_clients": self._num_clients,
            "clients": list(self.clients),
            "quits": list(self.quits),
            "reports": list(self.reports),
            "handler_failures": list(self.handler_failures),
            "told": [key for key in sorted(self._told.said, key=repr) if _can_be_kept(key)],
            "context": self._kept_of_context(),
            "metadata": self._that_can_be_kept(self.ctx.get_all_metadata(), "the metadata of the context"),
            "handlers": states_of(self.handlers),
            "ledger": None if self._ledger is None else self._ledger.get_state(),
            "rule": state_of(self.settings.aggregation.how),
            "aggregator": state_of(self.ctx.get_prop(ContextKey.AGGREGATOR)),
            "states_of_clients": dict(
                self.states_of_clients() if self.states_of_clients is not None else self.kept_of_clients
            ),
        }

    def set_state(self, state: Any) -> None:
        """Goes on with a state, after STARTUP: what `get_state` of the job before has given.

        Raises:
            StateError: It is no state of a job like this one: another model, other handlers.
        """
        try:
            self._set_state(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, FedLearnError):
                raise
            raise StateError(f"{self._where}: no state of this job: {described(error)}") from error

    def _set_state(self, state: Any) -> None:
        weights = FrozenWeights.adopt(state["model"])
        self._adopt(checked_model(weights, self.schema, f"model of {self._where}", constants=weights))
        self._begin(None)
        self.resumed = True
        if self._num_clients is not None:
            self._num_clients = max(self._num_clients, state["num_clients"] or 0)
        self.clients = dict.fromkeys(state["clients"])
        self._back = set(self.clients)
        self.quits = list(state["quits"])
        self.reports = list(state["reports"])
        self.handler_failures = list(state["handler_failures"])
        self._told.said.update(state["told"])
        self.kept_of_clients = state["states_of_clients"]
        if self._ledger is not None:
            self._ledger.set_state(state["ledger"])
        give_all_back(self.handlers, state["handlers"], self._where)
        give_back(self.settings.aggregation.how, state["rule"], self._where)
        give_back(self.ctx.get_prop(ContextKey.AGGREGATOR), state["aggregator"], self._where)
        self.ctx.set_props(state["context"])
        self.ctx.set_metadata({**self.ctx.get_all_metadata(), **state["metadata"]})

    def _kept_of_context(self) -> dict[str, Any]:
        own = {key for key in ContextKey if key not in _KEPT_KEYS}
        props = {key: value for key, value in self.ctx.items() if key not in own}
        return self._that_can_be_kept(props, "the context")

    def _that_can_be_kept(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Those of some values that can be stored; says once of each other one that it is not."""
        kept: dict[str, Any] = {}
        for key, value in values.items():
            try:
                if not isinstance(value, BestModel | str | int | float):
                    encoded(value)
            except StateError:
                if key not in self._not_kept:
                    self._not_kept.add(key)
                    logger.warning(
                        "%r in %s is %s, which is not kept in the state of the job: a handler that needs it can hand "
                        "it over by get_state",
                        key,
                        where,
                        a_type(type(value)),
                    )
            else:
                kept[str(key)] = value
        return kept

    @property
    def _where(self) -> str:
        return "the state" if self._store is None else str(self._store.folder)


def _can_be_kept(value: object) -> bool:
    try:
        encoded(value)
    except StateError:
        return False
    return True


def check_free(store: StateStore, resumed: bool) -> None:
    """Raises if a folder holds the state of a job that this one does not go on with.

    Raises:
        StateExistsError: It does.
    """
    numbers = store.numbers()
    if numbers and not resumed:
        rounds = f"{numbers[-1]} round{'s' * (numbers[-1] != 1)}"
        raise StateExistsError(
            f"{store.folder} holds the state of a job after {rounds}: FederatedServer.resume(...) goes on with it; or "
            "name another folder",
            path=str(store.folder),
        )


def load_state(folder: str | os.PathLike[str], *, newest: bool = False) -> Any:
    """The newest whole state of a folder, which may be given to `Job.start`.

    Args:
        folder: The folder.
        newest: Refuse a folder whose newest state is damaged, in the place of taking the one before.

    Raises:
        StateError: There is none, or none that is whole.
        OSError: It cannot be read.
    """
    _, state = StateStore(folder).load(newest=newest)
    _check_form(state, os.fspath(folder))
    return state


_FORM: dict[str, type | tuple[type, ...]] = {
    "settings": dict,
    "model": dict,
    "num_clients": (int, type(None)),
    "clients": list,
    "quits": list,
    "reports": list,
    "handler_failures": list,
    "told": list,
    "context": dict,
    "metadata": dict,
    "handlers": list,
    "states_of_clients": dict,
}
_RECORDS = {"clients": str, "quits": ClientFailure, "reports": RoundReport, "handler_failures": HandlerFailure}


def _check_form(state: Any, where: str) -> None:
    """Refuses what is no state of a job, whoever has written it.

    Raises:
        StateError: It is none.
    """
    right = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in _FORM.items())
    if not right or not all(isinstance(one, kind) for key, kind in _RECORDS.items() for one in state[key]):
        raise StateError(f"{where} holds no state of a job", path=where)
    unknown = sorted(set(state["settings"]) ^ set(JobSettings().kept()))
    if unknown:
        raise StateError(f"{where} holds a state with other settings than this fed_learn has: {unknown}", path=where)
