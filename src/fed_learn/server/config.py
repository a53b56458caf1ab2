"""`ServerConfig`: a server's configuration file, in the form of Clara Train 3.1's `config_fed_server.json`."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from fed_learn.aggregation.settings import PARTIAL
from fed_learn.client.fed_privacy import LaplacianProtocol, PercentileProtocol, SVTProtocol
from fed_learn.components.config import build_component
from fed_learn.errors import ConfigError
from fed_learn.policies import Policies
from fed_learn.server.model_aggregator import ModelAggregator

AGGREGATORS: dict[str, type] = {"ModelAggregator": ModelAggregator}
FILTERS: dict[str, type] = {cls.__name__: cls for cls in (LaplacianProtocol, PercentileProtocol, SVTProtocol)}
VALIDATION = "ServerValidationHandler"
STOPPING = "EarlyStoppingHandler"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What a server's configuration says, checked but not built.

    Attributes:
        num_rounds: Rounds to run.
        min_num_clients: Contributions that a round needs.
        validate_on_server: Whether the server validates, if the file says so.
        num_rounds_per_valid: Rounds from one validation on the server to the next.
        exclude_vars: Regular expression of variables that are not aggregated.
        policies: What becomes of variables by regular expressions of their names.
        partial: What becomes of parts of the model, if the file says so.
        handlers: Entries of the server's handlers, None where the file has none.
        aggregator: The entry of the aggregator.
        filters: Entries of the filters that each client's difference goes through.
        unused: Names of keys that mean nothing here.

    Example:
        >>> config = ServerConfig.of({"servers": [{"num_rounds": 5, "compression": "Gzip"}], "filters": []})
        >>> config.num_rounds, config.unused
        (5, ('servers[0].compression',))
    """

    num_rounds: int | None = None
    min_num_clients: int | None = None
    validate_on_server: bool | None = None
    num_rounds_per_valid: int | None = None
    exclude_vars: str | None = None
    policies: Policies = field(default_factory=Policies)
    partial: str | None = None
    handlers: list[Any] | None = None
    aggregator: Any = None
    filters: Sequence[Any] = ()
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Self:
        """Reads the settings of a file.

        All may stand at the top. Those of the server may also stand in the first entry of `"servers"`, and a privacy
        protocol as `"privacy"` in `"client"`, as in a client's file.

        Raises:
            ConfigError: A setting has the wrong type or is there twice.
        """
        found: dict[str, Any] = {}
        unused = []
        for place, group, known in _groups(settings):
            for key, value in group.items():
                if key not in known:
                    unused.append(f"{place}{key}")
                elif key in found:
                    raise ConfigError(f"{key!r} is there twice")
                else:
                    found[key] = value
        exclude_vars = _typed(found, "exclude_vars", str)
        try:
            re.compile(exclude_vars or "")
        except re.error as error:
            raise ConfigError(f"'exclude_vars' {exclude_vars!r} is no regular expression: {error}") from error
        filters = _typed(found, "filters", list) or []
        if found.get("privacy") is not None:
            filters = [*filters, found["privacy"]]
        return cls(
            num_rounds=_positive(found, "num_rounds"),
            min_num_clients=_positive(found, "min_num_clients"),
            validate_on_server=_typed(found, "validate_on_server", bool),
            num_rounds_per_valid=_positive(found, "num_rounds_per_valid"),
            exclude_vars=exclude_vars,
            policies=_policies(found),
            partial=_partial(found),
            handlers=_typed(found, "handlers", list),
            aggregator=found.get("aggregator"),
            filters=filters,
            unused=tuple(unused),
        )

    def handler_entries(self) -> list[Any] | None:
        """The entries of the server's handlers, the one that validates among them; None where the file says nothing.

        Raises:
            ConfigError: The file both names the handler that validates and says that the server does not.
        """
        if self.handlers is None and self.validate_on_server is None and self.num_rounds_per_valid is None:
            return None
        entries = [{"name": "ModelSelectionHandler"}] if self.handlers is None else list(self.handlers)
        named = any(map(_validates, entries))
        if named and self.validate_on_server is False:
            raise ConfigError(f"a {VALIDATION} among the handlers, and 'validate_on_server' false")
        if not named and (self.validate_on_server or (self.handlers is None and self.validate_on_server is None)):
            # It acts before the handler that stops a job by its scores.
            place = next((i for i, entry in enumerate(entries) if _names(entry, STOPPING)), len(entries))
            entries.insert(place, {"name": VALIDATION})
        return [self._with_period(entry) if _validates(entry) else entry for entry in entries]

    def _with_period(self, entry: dict[str, Any]) -> dict[str, Any]:
        args = entry.get("args", {})
        period = {"num_rounds_per_valid": self.num_rounds_per_valid or 1}
        return {**entry, "args": {**period, **args}} if isinstance(args, dict) else entry

    def build_aggregator(self, exact: bool = False) -> Any:
        """The aggregator; a `ModelAggregator` where the file only excludes variables; None where it does neither.

        Args:
            exact: For an aggregator that takes it.

        Raises:
            ConfigError: It cannot be built, or is no aggregator.
        """
        if self.aggregator is None and self.exclude_vars is None:
            return None
        entry = self.aggregator if self.aggregator is not None else {"name": ModelAggregator.__name__}
        supplies = {"exact": exact} | ({} if self.exclude_vars is None else {"exclude_vars": self.exclude_vars})
        return build_component(entry, AGGREGATORS, supplies, role="aggregator")

    def build_filters(self, seed: Sequence[int] | None = None) -> tuple[Any, ...]:
        """One client's own filters.

        Args:
            seed: For those that take one, with the place of each filter; different for each client.

        Raises:
            ConfigError: One cannot be built, or is no filter.
        """
        return tuple(
            build_component(entry, FILTERS, {} if seed is None else {"seed": [*seed, place]}, role="filter")
            for place, entry in enumerate(self.filters)
        )

    def doubts(self, aggregator: Any, variables: Iterable[str], clients: Iterable[str]) -> list[str]:
        """What in the file has no effect on this job, or a bad one, in a sentence each.

        Args:
            aggregator: What `build_aggregator` gave.
            variables: Names of the model's variables.
            clients: Names of the clients.
        """
        found = []
        if self.unused:
            names = ", ".join(map(repr, self.unused))
            found.append(
                f"unknown key {names} is ignored" if len(self.unused) == 1 else f"unknown keys {names} are ignored"
            )
        if self.exclude_vars and aggregator is not None and not hasattr(aggregator, "exclude_vars"):
            matched = [name for name in variables if re.search(self.exclude_vars, name)]
            if matched:
                found.append(
                    f"{type(aggregator).__name__} takes no 'exclude_vars': {', '.join(matched)} are aggregated"
                )
        if any(isinstance(one, dict) and "seed" in (one.get("args") or ()) for one in self.filters):
            found.append("a filter with a 'seed' of its own: every client draws the same noise, and can take it away")
        strangers = sorted(set(getattr(aggregator, "aggregation_weights", None) or ()) - set(clients))
        if strangers:
            found.append(f"'aggregation_weights' of clients that are not in the job: {', '.join(strangers)}")
        return found


def _groups(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any], set[str]]]:
    """Where settings stand: what to call the place, what is there, and which keys are known in it."""
    of_server = {"num_rounds", "min_num_clients", "validate_on_server", "num_rounds_per_valid"}
    of_server |= {"exclude_vars", "policies", "partial"}
    groups = [("", settings, of_server | {"handlers", "aggregator", "filters", "servers", "client"})]
    servers, client = _typed(settings, "servers", list) or [], _typed(settings, "client", dict) or {}
    for number, server in enumerate(servers):
        if not isinstance(server, dict):
            raise ConfigError(f"'servers' must hold objects, not {server!r}")
        groups.append((f"servers[{number}].", server, set() if number else of_server))
    return [*groups, ("client.", client, {"privacy", "filters"})]


def _validates(entry: Any) -> bool:
    return _names(entry, VALIDATION)


def _names(entry: Any, handler: str) -> bool:
    named = isinstance(entry, dict) and (entry.get("name") or entry.get("path"))
    return isinstance(named, str) and named.rpartition(".")[2] == handler


def _positive(settings: dict[str, Any], key: str) -> int | None:
    value = settings.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key!r} must be a number of at least 1, not {value!r}")
    return value


def _policies(settings: dict[str, Any]) -> Policies:
    try:
        return Policies(_typed(settings, "policies", dict))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"'policies': {str(error).removeprefix('policies: ')}") from error


def _partial(settings: dict[str, Any]) -> str | None:
    value: str | None = _typed(settings, "partial", str)
    if value is not None and value not in PARTIAL:
        raise ConfigError(f"'partial' must be {' or '.join(map(repr, PARTIAL))}, not {value!r}")
    return value


def _typed(settings: dict[str, Any], key: str, kind: type) -> Any:
    value = settings.get(key)
    if value is not None and not isinstance(value, kind):
        names = {list: "a list", dict: "an object", str: "a string", bool: "true or false"}
        raise ConfigError(f"{key!r} must be {names[kind]}, not {value!r}")
    return value
