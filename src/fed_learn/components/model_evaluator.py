"""`ModelEvaluator`, which scores the global model on the server's own data."""

from abc import ABC, abstractmethod

from fed_learn.model_meta import FLContext


class ModelEvaluator(ABC):
    """Scores the model in the context; `ServerValidationHandler` asks it to.

    Attributes:
        metric_name: What the score is; override it in a subclass.
        mode: `"max"` if more of it is better, `"min"` for losses. None: the name of the metric decides.

    Example:
        >>> import numpy as np
        >>> from fed_learn import ModelData
        >>> class Norm(ModelEvaluator):
        ...     metric_name = "norm"
        ...     def evaluate(self, ctx):
        ...         self.norm = float(np.linalg.norm(ctx.model.weights["w"]))
        ...     def get_metric(self):
        ...         return self.norm
        >>> evaluator = Norm()
        >>> evaluator.evaluate(FLContext(model=ModelData({"w": np.array([3.0, 4.0])})))
        >>> evaluator.get_metric()
        5.0
    """

    metric_name: str = "server_validation_metric"
    mode: str | None = None

    @abstractmethod
    def evaluate(self, ctx: FLContext) -> None:
        """Evaluates `ctx.model` and keeps the result for `get_metric`."""

    @abstractmethod
    def get_metric(self) -> float:
        """The score of the last evaluation: one number, of any kind."""
