"""One line in the log for each round, and one for whatever went wrong in it."""

import logging

from fed_learn.contribution import RoundReport
from fed_learn.errors import text_of
from fed_learn.handlers.handler import ServerHandler
from fed_learn.model_meta import ContextKey, FLContext


class RoundLogHandler(ServerHandler):
    """Logs each round through `logging`: INFO for the round, WARNING for refused contributions, ERROR for failures.

    Args:
        logger_name: Name of the logger.
    """

    def __init__(self, logger_name: str = "fed_learn.rounds") -> None:
        self.logger_name = logger_name

    def end_round(self, ctx: FLContext) -> None:
        """Logs the round's report."""
        report: RoundReport = ctx[ContextKey.REPORT]
        number = report.round + 1
        logger = logging.getLogger(self.logger_name)
        scores = "".join(f", {name} {value:.4f}" for name, value in report.metrics.items())
        logger.info(
            "round %d of %s: %d accepted, %d rejected%s, %.2f s",
            number,
            ctx.get_prop(ContextKey.NUM_ROUNDS, "?"),
            len(report.accepted),
            len(report.rejected),
            scores,
            report.seconds,
        )
        for failure in report.rejected:
            logger.warning("round %d: rejected, %s: %s", number, failure.cause, text_of(failure.error))
        if report.error is not None:
            logger.error("round %d failed: %s", number, text_of(report.error))
