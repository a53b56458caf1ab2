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
from fed_learn.components import Learner, ModelEvaluator, TrainingResult
from fed_learn.integrations.batches import (
    Mean,
    check_batch_size,
    check_repeatable,
    in_order,
    pair_of,
    score_name,
    shuffled,
)
from fed_learn.integrations.exchange import load, read, weights_in
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.weights import Array, WeightDict

Data: TypeAlias = Any
"""Arrays `(x, y)`, a `keras.utils.PyDataset`, or what yields batches `(x, y)` again and again: a `tf.data.Dataset`."""

Metric: TypeAlias = Any
"""`"accuracy"`, `"loss"`, a function of targets and outputs, or a `keras.metrics.Metric`."""


class KerasEvaluator(ModelEvaluator):
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
        self.model = model
        self.data = data
        self.metric = metric
        self.loss = loss
        self.batch_size = batch_size
        self.layout = layout
        self.metric_name = score_name(metric)
        self._score = float("nan")

    def evaluate(self, ctx: FLContext) -> None:
        """See `ModelEvaluator.evaluate`.

        Raises:
            ModelError: The context holds no model.
            NamesError, ShapeError, DtypeError: The global model does not fit the model.
        """
        load(self.model, weights_in(ctx), self.layout)
        scores = evaluate(self.model, self.data, {"score": self.metric}, loss=self.loss, batch_size=self.batch_size)
        self._score = scores["score"]

    def get_metric(self) -> float:
        """See `ModelEvaluator.get_metric`; NaN before the first evaluation."""
        return self._score


class KerasLearner(Learner):
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
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {epochs}")
        if not getattr(model, "compiled", False) or getattr(model, "optimizer", None) is None:
            raise ValueError("the model is not compiled: call its compile() with an optimizer and a loss")
        _check_data(data, batch_size)
        _check_data(validation_data, batch_size)
        self.model = model
        self.data = data
        self.validation_data = validation_data
        self.epochs = epochs
        self.batch_size = batch_size
        self.metrics = metrics
        self.validation_metric = validation_metric
        self.mode = mode
        self.layout = layout
        self.seed = seed
        self._optimizer: Any = None
        self._as_new: list[Array] = []
        self._remember_optimizer()
        named = self._named_metrics()
        for metric in named.values():
            _check_metric(metric, model, None)
        if validation_metric not in named:
            raise ValueError(f"validation_metric {validation_metric!r} is not one of the metrics: {sorted(named)}")

    def train(self, weights: WeightDict, ctx: FLContext) -> TrainingResult:
        """See `Learner.train`. The aggregation weight is the number of examples; `train_loss` their mean loss.

        Raises:
            NamesError, ShapeError, DtypeError: The global model does not fit the model.
            ValueError: There are no examples.
        """
        load(self.model, weights, self.layout)
        self._renew_optimizer()
        rng = np.random.default_rng([self.seed, ctx[ContextKey.ROUND]])
        losses, steps = Mean(), 0
        for _ in range(self.epochs):
            for x, y in _batches(self.data, self.batch_size, rng):
                logs = self.model.train_on_batch(x, y, return_dict=True)
                losses.add(float(logs["loss"]), len(y))
                steps += 1
            if isinstance(self.data, keras.utils.PyDataset):
                self.data.on_epoch_end()
        train_loss = losses.value()
        trained = read(self.model, weights, self.layout)
        return TrainingResult(trained, losses.count / self.epochs, steps, {"train_loss": train_loss})

    def validate(self, weights: WeightDict, ctx: FLContext) -> Mapping[str, float]:
        """See `Learner.validate`: the metrics, each a mean over the validation data."""
        load(self.model, weights, self.layout)
        batch_size = max(self.batch_size, 256)
        return evaluate(self.model, self.validation_data, self._named_metrics(), batch_size=batch_size)

    def _named_metrics(self) -> Mapping[str, Metric]:
        return self.metrics if isinstance(self.metrics, Mapping) else {name: name for name in self.metrics}

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
    functions: dict[str, Callable[[Any, Any], Any]] = {}
    for name, metric in metrics.items():
        if isinstance(metric, keras.metrics.Metric):
            metric.reset_state()
        elif isinstance(metric, str):
            functions[name] = _hits if metric == "accuracy" else _loss_of(model, loss)
        else:
            functions[name] = metric
    means = {name: Mean() for name in functions}
    count = Mean()
    for x, y in _batches(data, batch_size, None):
        outputs = _outputs(model, x)
        count.add(0.0, len(y))
        for name, metric in metrics.items():
            if name in functions:
                means[name].add(_mean(functions[name](y, outputs)), len(y))
            else:
                metric.update_state(y, outputs)
    count.value()  # refuses to score on nothing
    return {name: means[name].value() if name in means else _mean(m.result()) for name, m in metrics.items()}


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
