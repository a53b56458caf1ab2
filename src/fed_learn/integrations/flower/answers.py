"""Which nodes were asked in a round, and which of them have answered; and what is kept of an accepted reply."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict

from fed_learn.contribution import Contribution


@dataclass
class Answers:
    """The nodes of one round, each in the order in which it came.

    Attributes:
        asked: They were sent the model.
        heard: They answered.
        contributed: They contributed, accepted or not, and have not left the job.
        missed: It has been told that nothing came from them.
        arrived: Their replies reached the server, whatever the user's own code made of these; None: it is the user's
            own loop that fetches them.
    """

    asked: dict[Hashable, None] = field(default_factory=dict)
    heard: dict[Hashable, None] = field(default_factory=dict)
    contributed: dict[Hashable, None] = field(default_factory=dict)
    missed: dict[Hashable, None] = field(default_factory=dict)
    arrived: dict[Hashable, None] | None = None

    @property
    def silent(self) -> list[Hashable]:
        """Nodes that were asked and have not answered."""
        return [node for node in self.asked if node not in self.heard]

    def absent(self) -> list[Hashable]:
        """Silent nodes of which nothing has been told so far, and is from now on.

        A reply that arrived without being heard of was put aside by the user's own code.
        """
        came = self.heard if self.arrived is None else {**self.heard, **self.arrived}
        absent = [node for node in self.asked if node not in came and node not in self.missed]
        self.missed |= dict.fromkeys(absent)
        return absent


@dataclass(frozen=True)
class Accepted:
    """What is kept of a reply whose contribution was accepted, until its round is over.

    Attributes:
        content: What the client sent, without the arrays if the server streams.
        contribution: As it was accepted.
        message: The reply itself; None if the server streams.
    """

    content: RecordDict
    contribution: Contribution
    message: Message | None
