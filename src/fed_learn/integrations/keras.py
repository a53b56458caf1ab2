"""A Keras 3 model in a federation: `KerasEvaluator` scores the global model, `KerasLearner` is the work of a client.

Server validation takes three lines:

    evaluator = KerasEvaluator(model, (x_validation, y_validation))
    handlers = [ServerValidationHandler(evaluator, num_rounds_per_valid=1)]
    server = fl.FederatedServer(fl.get_weights(model), num_rounds=20, handlers=handlers)

An evaluator and each learner need a model of their own: the weights in it are overwritten.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

from fed_learn.adapters.layout import LayoutMap
from fed_learn.integrations.batches import check_batch_size, check_repeatable, in_order, pair_of, shuffled
from fed_learn.integrations.components import (
    FrameworkEvaluator,
    FrameworkLearner,
    KeptScore,
    MeanScore,
    Score,
    Step,
    score_batches,
)
from fed_learn.weights import Array

Data: TypeAlias = Any
"""Arrays `(x, y)`, a `keras.utils.PyDataset`, or what yields batches `(x, y)` again and again: a `tf.data.Dataset`."""

Metric: TypeAlias = Any
"""`"accuracy"`, `"loss"`, a function of targets and outputs, or a `keras.metrics.Metric`."""


class KerasEvaluator(FrameworkEvaluator):
    """Scores the global model in a Keras model, on the server's data.

    Args:
        model: A model that is built; what the weights are loaded into. Variables that the global model lacks stay as
            they are.
        data: Arrays `(x, y)` (then `batch_size` counts), a `keras.utils.PyDataset`, or any iterable of batches `(x, y)`
            that can be read again and again, such as a `tf.data.Dataset`.
        metric: `"accuracy"` (of classes, the last axis of the outputs), `"loss"`, or a function `f(y_true, y_pred)`
            that gives a number for each example or their mean; the score is the mean over all examples. Or a
            `keras.metrics.Metric`.
        loss: What is behind `"loss"`: a Keras loss, its name, or a function as above. None: the loss that the model was
            compiled with.
        batch_size: Examples in a batch of arrays.
        layout: The map of `fl.align` from the global model to this one, if they are not alike.

    Raises:
        ValueError: The metric is a name that is not known, there is no loss for it, or `batch_size` is not at least 1.
        TypeError: `data` can be read once only.

    Example:
        >>> from fed_learn import FLContext, ModelData
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, use_bias=False, name="head")])
        >>> evaluator = KerasEvaluator(model, (np.float32([[1], [-1], [2]]), np.array([0, 0, 1])))
        >>> weights = {model.layers[0].kernel.path: np.float32([[1, 0]])}
        >>> evaluator.evaluate(FLContext(model=ModelData(weights)))
        >>> round(evaluator.get_metric(), 4)
        0.3333
    """

    def __init__(
        self,
        model: keras.Model,
        data: Data,
        metric: Metric = "accuracy",
        *,
        loss: Any = None,
        batch_size: int = 256,
        layout: LayoutMap | None = None,
    ) -> None:
        _check_data(data, batch_size)
        _check_metric(metric, model, loss)
        super().__init__(model, data, metric, loss=loss, batch_size=batch_size, layout=layout)

    def score(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        """See `FrameworkEvaluator.score`."""
        return evaluate(self.model, self.data, metrics, loss=self.loss, batch_size=self.batch_size)


class KerasLearner(FrameworkLearner):
    """Trains and validates a compiled Keras model, as the work of a client.

    Each round starts from the global weights, with the optimizer as it was when it was new. The order of the examples
    of arrays depends on the seed and the round alone; other data keep their own. A model that draws at random (by
    dropout) should get seeds of its own.

    Args:
        model: This client's own: built, and compiled with an optimizer and a loss. Variables that the global model
            lacks stay local.
        data: To train on; see `KerasEvaluator`.
        validation_data: To select models by: not the same.
        epochs: Passes over the data in a round.
        batch_size: Examples in a step, where `data` are arrays.
        metrics: What `validate` scores: names, or a dict of names to metrics as `KerasEvaluator` takes.
        validation_metric: The one by which models are selected.
        mode: `"max"`, or `"min"` where less of it is better.
        layout: See `KerasEvaluator`.
        seed: Of the order of the examples; give each client its own.

    Raises:
        ValueError: The model is not compiled, a number is out of its range, a metric is not known, or
            `validation_metric` is not one of them.
        TypeError: Data can be read once only.

    Example:
        >>> import fed_learn as fl
        >>> x = np.linspace(-1, 1, 40, dtype=np.float32)[:, None]
        >>> data = x, (x[:, 0] > 0).astype(np.int64)
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, activation="softmax")])
        >>> model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy")
        >>> learner = KerasLearner(model, data, data, epochs=20)
        >>> server = fl.FederatedServer(fl.get_weights(model), num_rounds=2)
        >>> result = server.run([fl.FederatedClient("site-1", learner)])
        >>> learner.validate(result.weights, fl.FLContext())["accuracy"] > 0.9
        True
    """

    def __init__(
        self,
        model: keras.Model,
        data: Data,
        validation_data: Data,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        metrics: Sequence[str] | Mapping[str, Metric] = ("accuracy", "loss"),
        validation_metric: str = "accuracy",
        mode: str = "max",
        layout: LayoutMap | None = None,
        seed: int = 0,
    ) -> None:
        if not getattr(model, "compiled", False) or getattr(model, "optimizer", None) is None:
            raise ValueError("the model is not compiled: call its compile() with an optimizer and a loss")
        _check_data(data, batch_size)
        _check_data(validation_data, batch_size)
        super().__init__(
            model,
            data,
            validation_data,
            epochs=epochs,
            batch_size=batch_size,
            metrics=metrics,
            validation_metric=validation_metric,
            mode=mode,
            layout=layout,
            seed=seed,
        )
        for metric in self.named_metrics.values():
            _check_metric(metric, model, None)
        self._optimizer: Any = None
        self._as_new: list[Array] = []
        self._remember_optimizer()

    def begin(self) -> Step:
        """See `FrameworkLearner.begin`."""
        self._renew_optimizer()

        def step(batch: tuple[Any, Any]) -> tuple[float, int]:
            x, y = batch
            return float(self.model.train_on_batch(x, y, return_dict=True)["loss"]), len(y)

        return step

    def epoch(self, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
        """See `FrameworkLearner.epoch`."""
        yield from _batches(self.data, self.batch_size, rng)
        if isinstance(self.data, keras.utils.PyDataset):
            self.data.on_epoch_end()

    def score(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        """See `FrameworkLearner.score`."""
        return evaluate(self.model, self.validation_data, metrics, batch_size=max(self.batch_size, 256))

    def _remember_optimizer(self) -> None:
        self._optimizer = self.model.optimizer
        self._optimizer.build(self.model.trainable_variables)
        self._as_new = [_array(keras.ops.copy(variable)) for variable in self._optimizer.variables]

    def _renew_optimizer(self) -> None:
        # A new optimizer would have the training step traced anew: the values of this one are put back instead.
        if self._optimizer is None:  # after unpickling
            self._optimizer = self.model.optimizer
        elif self._optimizer is not self.model.optimizer:  # compiled anew
            self._remember_optimizer()
        for variable, value in zip(self._optimizer.variables, self._as_new, strict=True):
            variable.assign(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None}  # the model brings its own


def evaluate(
    model: keras.Model,
    data: Data,
    metrics: Mapping[str, Metric],
    *,
    loss: Any = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """Scores a model as it is; arguments as of `KerasEvaluator`.

    Returns:
        The score by the name of each metric.

    Raises:
        ValueError: There are no examples, or outputs and targets are nothing of which `"accuracy"` can be told.
    """
    scores = {name: _score_of(metric, model, loss) for name, metric in metrics.items()}
    return score_batches(scores, ((_outputs(model, x), y) for x, y in _batches(data, batch_size, None)))


def _score_of(metric: Metric, model: keras.Model, loss: Any) -> Score:
    if isinstance(metric, keras.metrics.Metric):
        metric.reset_state()
        return KeptScore(lambda outputs, targets: metric.update_state(targets, outputs), lambda: _mean(metric.result()))
    function = metric
    if isinstance(metric, str):
        function = _hits if metric == "accuracy" else _loss_of(model, loss)
    return MeanScore(lambda outputs, targets: function(targets, outputs), _mean)


def _outputs(model: keras.Model, x: Any) -> Any:
    # On TensorFlow predict_on_batch would be traced for each model and size of batch, which TensorFlow counts over all
    # models and warns of. On the others it keeps gradients out.
    return model(x, training=False) if keras.backend.backend() == "tensorflow" else model.predict_on_batch(x)


def _hits(targets: Any, outputs: Any) -> Array:
    true, given = _array(targets), _array(outputs)
    if given.ndim != true.ndim + 1 or given.shape[-1] < 2 or true.dtype.kind == "f":
        raise ValueError(
            f"'accuracy' is that of outputs (examples, …, classes) and targets (examples, …), not of {given.shape} and "
            f"{true.shape} of {true.dtype}; give a function as the metric, such as keras.metrics.binary_accuracy"
        )
    hits: Array = given.argmax(axis=-1) == true
    return hits


def _loss_of(model: keras.Model, loss: Any) -> Callable[[Any, Any], Any]:
    chosen = loss if loss is not None else getattr(model, "loss", None)
    if chosen is None:
        raise ValueError("'loss' needs one: compile the model with a loss, or give loss=")
    function: Callable[[Any, Any], Any] = keras.losses.get(chosen)
    return function


def _mean(value: Any) -> float:
    return float(_array(value).astype(np.float64).mean())


def _array(value: Any) -> Array:
    array: Array = np.asarray(keras.ops.convert_to_numpy(value))
    return array


def _batches(data: Data, batch_size: int, rng: np.random.Generator | None) -> Iterator[tuple[Any, Any]]:
    """Batches of the data; in a random order where they are arrays, and `rng` is given."""
    if _are_arrays(data):
        x, y = data
        chosen = in_order(len(y), batch_size) if rng is None else shuffled(len(y), batch_size, rng)
        yield from ((x[c], y[c]) for c in chosen)
    elif isinstance(data, keras.utils.PyDataset):
        yield from (pair_of(data[number]) for number in range(len(data)))
    else:
        yield from map(pair_of, data)


def _are_arrays(data: Data) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, np.ndarray) for part in data)


def _check_metric(metric: Metric, model: keras.Model, loss: Any) -> None:
    if metric == "loss":
        _loss_of(model, loss)
    elif metric != "accuracy" if isinstance(metric, str) else not callable(metric):
        raise ValueError(f"a metric must be 'accuracy', 'loss' or a function, not {metric!r}")


def _check_data(data: Data, batch_size: int) -> None:
    check_batch_size(batch_size)
    if _are_arrays(data):
        if len(data[0]) != len(data[1]):
            raise ValueError(f"there are {len(data[0])} inputs and {len(data[1])} targets")
    elif not isinstance(data, keras.utils.PyDataset):
        check_repeatable(data)
