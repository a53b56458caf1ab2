"""What is worth telling of a demo job, as plain values for JSON."""

from typing import Any

from fed_learn.handlers.json_lines import jsonable
from fed_learn.handlers.model_selection import SELECTION_METRIC
from fed_learn.model_meta import ContextKey
from fed_learn.server import JobResult
from fed_learn.simulation.demo import Demo
from fed_learn.simulation.update_norms import PREFIX


def summarize(demo: Demo, result: JobResult) -> dict[str, Any]:
    """The summary of a job.

    Returns:
        `best` (`round`, `source`: aggregated or received, `metric_name`, `metric`, `test_accuracy`, `test_loss`; None
        if no handler selected a model), `final` (`test_accuracy`, `test_loss`, `selection`), `cross_site` (model →
        client → accuracy), `frameworks` (client → framework), `update_norms` (client → per round how far it moved the
        global model, None where it contributed nothing; empty without an `UpdateNormHandler`), `rounds` (a dict per
        round, as `RoundReport.as_dict(times=False)`), `quits`, `handler_failures`, `stop_reason`.
    """
    best = None
    if result.best is not None:
        aggregated = demo.server.ctx.get_prop(ContextKey.BEST_AGGREGATED) is result.best
        test = demo.test(result.best.weights)
        best = {
            "round": result.best.round,
            "source": "aggregated" if aggregated else "received",
            "metric_name": result.best.metric_name,
            "metric": result.best.metric,
            "test_accuracy": test["accuracy"],
            "test_loss": test["loss"],
        }
    test = demo.test(result.weights)
    summary: dict[str, Any] = jsonable(
        {
            "best": best,
            "final": {
                "test_accuracy": test["accuracy"],
                "test_loss": test["loss"],
                "selection": result.metrics.get(SELECTION_METRIC),
            },
            "cross_site": {model: dict(row) for model, row in result.cross_site.items()},
            "frameworks": demo.frameworks,
            "update_norms": _update_norms(demo, result),
            "rounds": [report.as_dict(times=False) for report in result.reports],
            "quits": [failure.as_dict() for failure in result.quits],
            "handler_failures": [str(failure) for failure in result.handler_failures],
            "stop_reason": result.stop_reason,
        }
    )
    return summary


def times(result: JobResult) -> list[dict[str, Any]]:
    """How long each round of a job took, and the averaging in it, in seconds."""
    return [
        {"round": one.round, "seconds": one.seconds, "aggregation_seconds": one.aggregation_seconds}
        for one in result.reports
    ]


def site_labels(summary: dict[str, Any]) -> dict[str, str]:
    """What to call the clients: with their frameworks, where these differ.

    Example:
        >>> site_labels({"frameworks": {"site-1": "torch", "site-2": "tensorflow"}})
        {'site-1': 'site-1 (torch)', 'site-2': 'site-2 (tensorflow)'}
    """
    frameworks = summary["frameworks"]
    differ = len(set(frameworks.values())) > 1
    return {client: f"{client} ({name})" if differ else client for client, name in frameworks.items()}


def _update_norms(demo: Demo, result: JobResult) -> dict[str, list[float | None]]:
    norms = {client: [r.metrics.get(PREFIX + client) for r in result.reports] for client in demo.frameworks}
    return norms if any(value is not None for row in norms.values() for value in row) else {}
