"""A progress bar over rounds and clients, and a table that grows by a line per round."""

from typing import Any

from fed_learn.contribution import RoundReport
from fed_learn.handlers.handler import ServerHandler
from fed_learn.handlers.model_selection import SELECTION_METRIC
from fed_learn.handlers.server_validation import SERVER_VALIDATION_METRIC
from fed_learn.model_meta import ContextKey, FLContext

HEADER = "  round  accepted  rejected  selection     server           aggregation  kernel"


class ProgressHandler(ServerHandler):
    """Shows where a job is: bars on a terminal, and everywhere a line per round.

    The columns: accepted and rejected contributions, the score of the model the clients received
    (ModelSelectionHandler), the score of the model just aggregated (ServerValidationHandler), time and bytes of the
    aggregation, and the kernel. Put it behind the handlers whose scores it shows.

    Args:
        stderr: Print there and leave the standard output alone.

    Raises:
        ImportError: rich is not installed (extra `cli`).
    """

    def __init__(self, stderr: bool = False) -> None:
        try:
            import rich  # noqa: F401 - asked for now, rather than when the job starts
        except ImportError as error:
            raise ImportError("ProgressHandler needs rich: pip install 'fed-learn[cli]'") from error
        self.stderr = stderr
        self._progress: Any = None
        self._rounds: Any = None
        self._over = 0
        self._clients: Any = None

    def startup(self, ctx: FLContext) -> None:
        """Shows the bars and the head of the table."""
        super().startup(ctx)
        self._over = 0
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=self.stderr, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:>7}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds = self._progress.add_task("rounds", total=ctx.get_prop(ContextKey.NUM_ROUNDS))
        self._clients = self._progress.add_task("clients", total=0)
        self._progress.start()
        self._print(HEADER, "bold")

    def start_round(self, ctx: FLContext) -> None:
        """No client is at work yet."""
        self._progress.update(self._clients, completed=0, total=0)

    def send_global_model(self, ctx: FLContext) -> None:
        """One more client to wait for."""
        task = self._progress.tasks[self._clients]
        if task.completed:  # the round is over, and the final model goes out
            self._progress.update(self._clients, completed=0, total=0)
        self._progress.update(self._clients, total=task.total + 1)

    def receive_contribution(self, ctx: FLContext) -> None:
        """One client is done."""
        self._progress.advance(self._clients)

    def receive_validation_results(self, ctx: FLContext) -> None:
        """One client has scored the final model."""
        if not self._progress.tasks[self._clients].finished:
            self._progress.advance(self._clients)

    def end_round(self, ctx: FLContext) -> None:
        """Prints the round's line."""
        report: RoundReport = ctx[ContextKey.REPORT]
        self._over += 1
        self._progress.advance(self._rounds)
        self._print(line(report), "red" if report.error or report.rejected else "")
        for problem in (*report.rejected, *report.quits):
            self._print(f"         {problem.cause}: {problem.error}", "red")
        if report.error is not None:
            self._print(f"         round failed: {report.error}", "red")

    def get_state(self) -> dict[str, Any]:
        """How many rounds are over."""
        return {"rounds": self._over}

    def set_state(self, state: Any) -> None:
        """Goes on behind them."""
        self._over = state["rounds"]
        self._progress.update(self._rounds, completed=self._over)
        self._print(f"         resumed after round {self._over}", "")

    def shutdown(self, ctx: FLContext) -> None:
        """Takes the bars away."""
        self._progress.stop()
        self._progress = None

    def _print(self, text: str, style: str) -> None:
        from rich.text import Text

        self._progress.console.print(Text(text, style))


def line(report: RoundReport) -> str:
    """A round's line in the table, below `HEADER`.

    Example:
        >>> print(line(RoundReport(0, accepted=("a", "b"), metrics={"selection": 0.5}, kernel="native")))
              1         2         0     0.5000          –     0.00 ms     0.0 kB  native
    """
    scores = [
        f"{report.metrics[name]:.4f}" if name in report.metrics else "–"
        for name in (SELECTION_METRIC, SERVER_VALIDATION_METRIC)
    ]
    size = report.aggregation_bytes
    amount = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
    time = f"{report.aggregation_seconds * 1e3:.2f} ms"
    return (
        f"{report.round + 1:>7}  {len(report.accepted):>8}  {len(report.rejected):>8}  {scores[0]:>9}  "
        f"{scores[1]:>9}  {time:>10} {amount:>10}  {report.kernel}"
    )
