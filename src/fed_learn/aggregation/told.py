"""`Told`: warnings about what clients send, each logged once in a job."""

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field

from fed_learn.errors import printable
from fed_learn.limits import MOST_TOLD

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Told:
    """Logs each warning once in a job.

    Attributes:
        logger: The log that they go to.
        said: What has been told.
    """

    logger: logging.Logger = logger
    said: set[Hashable] = field(default_factory=set)

    def once(self, about: Hashable, text: str) -> None:
        """Logs a sentence, unless one about the same subject, or `MOST_TOLD` others, have been logged before."""
        if about not in self.said and len(self.said) <= MOST_TOLD:
            self.said.add(about)
            more = "" if len(self.said) <= MOST_TOLD else "; no more is told of what clients send"
            self.logger.warning("%s", printable(text + more))
