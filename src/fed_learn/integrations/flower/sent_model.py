"""The global model as messages carry it: a record, of all variables or of the part of them that clients send.

Of a model of which clients send a part, messages carry that part, as with Flower, once a round has shown it: clients
may keep the rest of it for themselves, and would take over what they receive.
"""

import logging
from collections.abc import Sequence

from flwr.app import ArrayRecord

from fed_learn.aggregation.told import Told
from fed_learn.integrations.flower.answers import Answers
from fed_learn.integrations.flower.records import copy_of, same_bytes, to_record, to_weights
from fed_learn.server.job import Job
from fed_learn.weights import FrozenWeights, Schema, WeightDict, listed

logger = logging.getLogger("flwr")


class SentModel:
    """What the messages of a job carry of its global model.

    Args:
        job: The job.
        told: Says things once in the job.
        record: The initial global model as a record, if there is one.

    Attributes:
        part: Names of the variables that messages carry; None: all.
    """

    def __init__(self, job: Job, told: Told, record: ArrayRecord | None = None) -> None:
        self._job = job
        self._told = told
        self._written = (job.weights, record)  # the record of these weights, which is made where it is first needed
        self._ever: dict[str, None] = {}
        self._narrow = False
        self.part: tuple[str, ...] | None = None
        self._carry(list(job.schema))

    @property
    def record(self) -> ArrayRecord:
        """What messages carry: a record of the caller's own, who may change it."""
        return copy_of(self._own_record())

    @property
    def names(self) -> frozenset[str]:
        """Names of the variables that messages carry."""
        return frozenset(self._job.schema if self.part is None else self.part)

    def holds(self, arrays: ArrayRecord) -> bool:
        """Whether a record is what messages carry, unchanged."""
        return same_bytes(arrays, self._own_record())

    def whole(self, arrays: ArrayRecord) -> ArrayRecord:
        """The whole global model; with what a subclass has made of it, if `arrays` are not what messages carry.

        Raises:
            ContributionError: `arrays` cannot be read.
        """
        if self.holds(arrays):
            return arrays if self.part is None else to_record(self._job.weights)
        return to_record(self.completed(to_weights(arrays, like=self._job.schema)))

    def completed(self, weights: FrozenWeights) -> FrozenWeights:
        """A model that comes from outside, with the rest of the global model where it has a part of that.

        Raises:
            DtypeError: A variable of the part is not as the global model has it.
        """
        schema = self._job.schema
        if not weights or not weights.keys() < schema.keys():
            return weights
        if any(array.shape != schema[name][0] for name, array in weights.items()):
            return weights  # another model
        fit, _ = schema.fit(weights, "global model")
        return FrozenWeights.adopt({name: fit.get(name, array) for name, array in self._job.weights.items()})

    def note_sent(self, names: Sequence[str], answers: Answers) -> None:
        """Notes which variables the clients have sent in a round: messages carry these from now on.

        Where each may send other ones (`partial="average"`), they carry all that anyone ever sent, and the whole model
        until a round in which everyone answered.

        Args:
            names: Of the variables.
            answers: Who answered in the round.
        """
        if self._job.settings.aggregation.partial == "average":
            self._ever |= dict.fromkeys(names)
            self._narrow = self._narrow or set(answers.asked) <= set(answers.contributed)
            names = [name for name in self._job.schema if name in self._ever or not self._narrow]
        self._carry(names)

    def take_part(self, made: WeightDict, who: str) -> None:
        """Messages are to carry just the variables that a strategy returns, as with Flower, if the model has them.

        Args:
            made: What it returns.
            who: The strategy, for the log.
        """
        schema = self._job.schema
        if not made or any(name not in schema or array.shape != schema[name][0] for name, array in made.items()):
            return
        carried = self.names
        dropped = [name for name in schema if name in carried and name not in made]
        if dropped:
            self._told.once(
                ("fewer", frozenset(dropped)),
                f"{who} returns {len(made)} of the global model's {len(schema)} variables: clients are sent these, and "
                f"the rest is kept as it is: {listed(dropped)}",
            )
        self._carry([name for name in schema if name in made])

    def change(self, schema: Schema, who: str) -> None:
        """From the next round on the model has other names, shapes or dtypes.

        Args:
            schema: These.
            who: What has changed them.
        """
        before = self._job.schema
        changes = {
            "adds": [name for name in schema if name not in before],
            "drops": [name for name in before if name not in schema],
            "changes the shape or dtype of": [
                name for name in before if name in schema and schema[name] != before[name]
            ],
        }
        parts = [f"{what} {listed(names)}" for what, names in changes.items() if names]
        logger.warning(
            "\t> the global model is another one from now on: %s %s", who, " and ".join(parts) or "reorders it"
        )
        self._job.change_schema(schema)
        self.part = None
        self._carry(list(schema))

    def _carry(self, names: Sequence[str]) -> None:
        """Notes which variables messages carry from now on: never those that clients keep to themselves."""
        schema, local = self._job.schema, self._job.local
        names = [name for name in names if name not in local]
        part = None if len(names) == len(schema) or not schema else tuple(names)
        if part != self.part:
            self.part, self._written = part, (self._job.weights, None)

    def _own_record(self) -> ArrayRecord:
        """What messages carry, written once for each global model."""
        (written, record), weights = self._written, self._job.weights
        if written is not weights or record is None:
            record = to_record(weights if self.part is None else {name: weights[name] for name in self.part})
            self._written = weights, record
        return record
