"""What clients' replies say: who sent them, and the contribution or the scores in them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from fed_learn.contribution import Contribution, Kind, check_aggregation_weight, check_contributor
from fed_learn.errors import (
    AggregationWeightError,
    ClientQuitError,
    ContributionError,
    UnknownContributorError,
    WeightsTypeError,
    brief,
)
from fed_learn.integrations.flower.records import to_weights
from fed_learn.integrations.flower.selection import Stated
from fed_learn.values import whole_number_of
from fed_learn.weights import FrozenWeights, Schema

R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)

METADATA = "fed_learn"
"""Key of the `ConfigRecord` that is ours. In a reply `ClientMod` states `contributor`, `round` (from 0), `kind`,
`SCORES`, and the `metric` and the `mode` of its score; in a message our server may state `SCORE_ONLY`."""
SCORES = "scores"
"""The entry of `METADATA` that is true in a reply of a `ClientMod` that scores the models that it receives."""
SCORE_ONLY = "score-only"
"""The entry of `METADATA` that is true where such a `ClientMod` is to score the model of a message, not to train it."""
PARTITION_ID = "partition-id"
"""The entry of a node's configuration that names it, and of a `MetricRecord` that passes it on."""
N_ITER = "num-iterations"
"""The entry of a `MetricRecord` that counts the local iterations."""
LONGEST_CAUSE = 500
"""Characters of what is shown of a client's error."""

_FLOWERS = re.compile(r"<class '(?P<kind>[^']+)'>:<'(?P<message>.*)'>", re.DOTALL)
_WRAPPED = re.compile(r"Exception (?P<kind>\w+) occurred\. Message: (?P<message>.*)\Z", re.DOTALL)
_TRACE = re.compile(r"^Traceback \(most recent call last\)|^ray::", re.MULTILINE)
"""Of a traceback the last line says the cause."""


@dataclass(frozen=True)
class Keys:
    """Under which names the numbers are found in a `MetricRecord`.

    Attributes:
        weight: The aggregation weight.
        n_iter: The number of local iterations.
        arrays: The `ArrayRecord` with the model, where a reply has several.
    """

    weight: str
    n_iter: str
    arrays: str = "arrays"


@dataclass(frozen=True)
class Place:
    """Where a reply stands among those of its round, counted from 1: in place of a node that has no number."""

    number: int


def partition_name(partition_id: object) -> str:
    """The contributor's name of a partition.

    Example:
        >>> partition_name(3), partition_name(3.0)
        ('partition-3', 'partition-3')
    """
    if isinstance(partition_id, float) and partition_id.is_integer():
        partition_id = int(partition_id)
    return f"partition-{partition_id}"


def node_name(node: object) -> str:
    """The name of a node that tells none: not the same in another run.

    Example:
        >>> node_name(17), node_name(Place(2)), node_name("10.0.0.1:80/a")
        ('node-17', 'reply-2', 'node-10.0.0.1:80%2Fa')
    """
    if isinstance(node, Place):
        return f"reply-{node.number}"
    # A client id of Flower's older interface may hold anything, and two of them must not become one name.
    return f"node-{quote(node, safe=':<>') if isinstance(node, str) else node}"


def node_of(message: Message, place: int) -> int | Place:
    """The number of the node that sent a reply; its place, if no node did, as in a test without a grid."""
    node = message.metadata.src_node_id
    return node if isinstance(node, int) and node not in (0, SUPERLINK_NODE_ID) else Place(place)


def failure_of(message: Message, node: object) -> ClientQuitError:
    """What a reply says of the error that it carries."""
    name = node_name(node)
    return ClientQuitError(f"{name}: {_cause(str(message.error.reason or ''))} (code {message.error.code})")


def _cause(reason: str) -> str:
    r"""What is said of an exception of a client's, its type and its message, in one line.

    Example:
        >>> _cause("<class 'RuntimeError'>:<'no <disk>'>"), _cause("no room")
        ('RuntimeError: no <disk>', 'no room')
        >>> _cause("<class 'flwr.x.ClientAppException'>:<'\nException KeyError occurred. Message: 'w''>")
        "KeyError: 'w'"
    """
    kind = ""
    if found := _FLOWERS.fullmatch(reason.strip()):
        kind, reason = found["kind"].rpartition(".")[2], found["message"]
    if found := _WRAPPED.search(reason):  # by the code around a ClientApp
        kind, reason = found["kind"], found["message"]
    lines = reason.split("\n") if _TRACE.search(reason) is None else reason.strip().split("\n")[-1:]
    said = " ".join(" ".join(lines).split())
    said = said if len(said) <= LONGEST_CAUSE else f"{said[:LONGEST_CAUSE]}…"
    return ": ".join(part for part in (kind, said) if part) or "no reason given"


def of_partition(name: str) -> bool:
    """Whether a name is that of a partition of the data, which several nodes may have.

    Example:
        >>> of_partition("partition-3"), of_partition("hospital-a")
        (True, False)
    """
    return name.startswith("partition-")


def checked_name(claim: object, node: object) -> str:
    """What a node claims to be called.

    Raises:
        UnknownContributorError: It is nothing that could be a name, or is another node's.
    """
    own = node_name(node)
    try:
        name = check_contributor(claim)
    except UnknownContributorError as error:
        raise UnknownContributorError(f"{own}: {error}", contributor=own) from None
    _, at, node_of_claim = name.rpartition(f"@{node_name('')}")
    if (name.startswith((node_name(""), "reply-")) and name != own) or (at and node_name("") + node_of_claim != own):
        raise UnknownContributorError(f"{own}: claims to be {brief(name)}, the name of another node", contributor=own)
    return name


class Records(NamedTuple):
    """The records of a reply.

    Attributes:
        arrays: Its `ArrayRecord`s by key.
        metrics: Its `MetricRecord`s.
        stated: What `ClientMod` states in it.
    """

    arrays: dict[str, ArrayRecord]
    metrics: list[MetricRecord]
    stated: Mapping[str, Any]


class Reply:
    """A client's reply, of which each record is looked at once.

    What it holds is not to be trusted, and is read where it is first asked for: what goes wrong then is the client's.

    Args:
        message: The reply.
        place: Where it stands among those of its round, from 1.

    Attributes:
        message: As given.
        node: Who sent it; see `node_of`.
    """

    def __init__(self, message: Message, place: int) -> None:
        self.message = message
        self.node = node_of(message, place)

    @cached_property
    def records(self) -> Records:
        """Its records, by their kinds."""
        arrays: dict[str, ArrayRecord] = {}
        metrics: list[MetricRecord] = []
        stated: Mapping[str, Any] = {}
        for key, record in self.message.content.items():
            if isinstance(record, ArrayRecord):
                arrays[key] = record
            elif isinstance(record, MetricRecord):
                metrics.append(record)
            elif key == METADATA and isinstance(record, ConfigRecord):
                stated = record
        return Records(arrays, metrics, stated)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """All single numbers of its `MetricRecord`s."""
        metrics: dict[str, Any] = {}
        for record in self.records.metrics:
            for key, value in record.items():
                if not isinstance(value, list):
                    metrics[key] = value
        return metrics

    def lists(self) -> dict[str, Any]:
        """All lists of numbers of its `MetricRecord`s."""
        lists: dict[str, Any] = {}
        for record in self.records.metrics:
            for key, value in record.items():
                if isinstance(value, list):
                    lists[key] = value
        return lists

    @cached_property
    def score(self) -> Stated | None:
        """What `ClientMod` says of the score in it; None if it says nothing."""
        return Stated.of(self.records.stated) if self.records.stated else None

    @cached_property
    def claim(self) -> str | None:
        """The name under which it contributes; None if it tells none.

        A metric `"partition-id"` tells one if it is a number of a partition; whatever else an app means by it is its
        own.

        Raises:
            UnknownContributorError: What `ClientMod` states is nothing that could be a name, or is another node's.
        """
        if not self.message.has_content():
            return None
        claim = self.records.stated.get("contributor")
        if claim is not None:
            return checked_name(claim, self.node)
        partition = self.metrics.get(PARTITION_ID)
        number = None if partition is None else whole_number_of(partition)
        return None if number is None else partition_name(number)

    def contribution(
        self, name: str, keys: Keys, schema: Schema, kind: Kind, metrics: Mapping[str, Any], *, states_round: bool
    ) -> Contribution:
        """The contribution in it, its weights views of its bytes. Not checked beyond being readable.

        Args:
            name: Whose it is.
            keys: Under which names the numbers are found.
            schema: Of the global model.
            kind: What it is, if it does not state it.
            metrics: Those that are kept.
            states_round: Whether the message that it answers stated the round.

        Raises:
            ContributionError: It is none.
        """
        arrays, stated = self._only_arrays(name, keys.arrays), self.records.stated
        weights, n_iter = to_weights(arrays, like=schema, contributor=name), self.metrics.get(keys.n_iter)
        metric_records = self.records.metrics
        if len(metric_records) > 1 and sum([keys.weight in record for record in metric_records]) > 1:
            raise AggregationWeightError(
                f"{name}: two of the reply's MetricRecords have a {keys.weight!r}, and one must weigh it",
                contributor=name,
                value=None,
            )
        if keys.weight not in self.metrics:
            raise AggregationWeightError(
                f"{name}: the reply has no number {keys.weight!r} to be weighted by", contributor=name, value=None
            )
        return Contribution(
            name,
            weights,
            _plain_weight(self.metrics[keys.weight]),
            n_iter=None if n_iter is None else whole_number_of(n_iter),  # what else an app means by it is its own
            round=_round_of(self.message, stated) if states_round or METADATA in self.message.content else None,
            kind=stated.get("kind", kind),
            metrics={key: value for key, value in metrics.items() if key not in (PARTITION_ID, keys.weight)},
            info=self.lists(),
        )

    def weights(self, key: str) -> FrozenWeights | None:
        """Its weights, for want of a global model; None if they cannot be read."""
        if not self.message.has_content():
            return None
        try:
            return to_weights(self._only_arrays("", key))
        except ContributionError:  # to be refused with its reason where it is received
            return None

    def _only_arrays(self, name: str, key: str) -> ArrayRecord:
        """Its only `ArrayRecord`, or of several the one under the key under which the model was sent.

        Raises:
            WeightsTypeError: There is none.
        """
        arrays = self.records.arrays
        if key in arrays:
            return arrays[key]
        if len(arrays) == 1:
            return next(iter(arrays.values()))
        raise WeightsTypeError(
            f"{name}: the reply has {len(arrays)} ArrayRecords, and none of them is called {key!r}"
            if arrays
            else f"{name}: the reply has no ArrayRecord",
            contributor=name,
        )


def _plain_weight(value: Any) -> float:
    """An aggregation weight as a float; what cannot be one as it is, to be refused with the contribution."""
    try:
        return check_aggregation_weight(value)
    except AggregationWeightError:
        return value  # type: ignore[no-any-return]


def replies_of(messages: Iterable[Message]) -> list[Reply]:
    """The replies of a round."""
    return [Reply(message, place) for place, message in enumerate(messages, 1)]


def claims_of(replies: Iterable[Reply]) -> Iterator[tuple[int | Place, str | None]]:
    """What replies claim to be called, those that may not be called so left out: they are refused one by one."""
    for reply in replies:
        try:
            yield reply.node, reply.claim
        except UnknownContributorError:
            continue


def records_of(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """The records of one kind. Flower's own properties for it leave the content in a reference cycle, in memory."""
    return {key: record for key, record in content.items() if isinstance(record, kind)}


def array_records(content: RecordDict) -> list[ArrayRecord]:
    """The `ArrayRecord`s of a message."""
    return list(records_of(content, ArrayRecord).values())


def metrics_of(content: RecordDict) -> dict[str, Any]:
    """All single numbers of all `MetricRecord`s."""
    records = records_of(content, MetricRecord).values()
    return {key: value for record in records for key, value in record.items() if not isinstance(value, list)}


def without_arrays(content: RecordDict) -> RecordDict:
    """The same without the `ArrayRecord`s."""
    return RecordDict({key: record for key, record in content.items() if not isinstance(record, ArrayRecord)})


def states(content: RecordDict, entry: str) -> bool:
    """Whether the `METADATA` of a message or a reply has this entry, and it is true."""
    return _metadata(content).get(entry) is True


def _metadata(content: RecordDict) -> Mapping[str, Any]:
    return records_of(content, ConfigRecord).get(METADATA, {})


def _round_of(message: Message, stated: Mapping[str, Any]) -> int | None:
    """The round, from 0: as the reply states it, or else as the message did that it answers."""
    number = stated.get("round")
    if number is not None:
        return number  # type: ignore[no-any-return] # whatever it is, it is checked with the contribution
    group = message.metadata.group_id
    return int(group) - 1 if isinstance(group, str) and group.isdecimal() and len(group) < 19 else None
