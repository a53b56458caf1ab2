"""A privacy protocol by Clara Train 3.1's API, named in `config_fed_server.json`: it drops numbers at random."""

import logging
from typing import Any

import numpy as np

from fed_learn.client.fed_privacy import PrivacyProtocol


class RandomDrop(PrivacyProtocol):
    """Sets a part of the numbers of each variable to 0.

    Args:
        percentage: How many of a hundred are dropped.
        seed: Of the choice.
    """

    def __init__(self, percentage: float = 10, seed: Any = None) -> None:
        PrivacyProtocol.__init__(self)
        self.percentage = percentage
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.logger = logging.getLogger("RandomDrop")

    def apply(self, model_diff: dict[str, Any], train_ctx: Any = None) -> dict[str, Any]:
        """Changes the differences in place."""
        for name, diff in model_diff.items():
            dropped = self.rng.choice(diff.size, size=int(diff.size * self.percentage / 100), replace=False)
            np.put(diff, dropped, 0)
            self.logger.info("dropped %d of %d numbers of %s", len(dropped), diff.size, name)
        return model_diff
