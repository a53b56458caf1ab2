"""`Told`: what is said of clients, each thing once in a job."""

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field

from fed_learn.errors import printable
from fed_learn.limits import MOST_TOLD

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Told:
    """Says things once in a job, as warnings in the log.

    Attributes:
        logger: Where to.
    """

    logger: logging.Logger = logger
    _said: set[Hashable] = field(default_factory=set)

    def once(self, about: Hashable, text: str) -> None:
        """Logs a sentence, unless one about the same was logged before, or `MOST_TOLD` others."""
        if about not in self._said and len(self._said) <= MOST_TOLD:
            self._said.add(about)
            more = "" if len(self._said) <= MOST_TOLD else "; no more is told of what clients send"
            self.logger.warning("%s", printable(text + more))
