"""A Keras 3 model in a federation: `KerasEvaluator` scores the global model, `KerasLearner` is the work of a client.

Server validation takes three lines:

    evaluator = KerasEvaluator(model, (x_validation, y_validation))
    handlers = [ServerValidationHandler(evaluator, num_rounds_per_valid=1)]
    server = fl.FederatedServer(fl.get_weights(model), num_rounds=20, handlers=handlers)

An evaluator and each learner need a model of their own: the weights in it are overwritten.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

from fed_learn.adapters.keras_layers import keras2_layer
from fed_learn.adapters.layout import LayoutMap
from fed_learn.errors import ModelError
from fed_learn.integrations.batches import check_repeatable, count_of, form_of, in_order, pair_of, shuffled, tensors_in
from fed_learn.integrations.components import (
    Batch,
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


class _NamesKept:
    """Keeps the names of the model's variables, some of which Keras changes as a model is pickled."""

    model: keras.Model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_names": [variable.path for variable in self.model.weights]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("_names")
        self.__dict__.update(state)
        if len(self.model.weights) != len(names):
            raise ModelError(
                f"model {self.model.name!r} came back from pickle with {len(self.model.weights)} of its {len(names)} "
                "variables: its layers must be able to build themselves as Keras loads them"
            )
        for variable, name in zip(self.model.weights, names, strict=True):
            variable._path = name  # Keras has no public way; where this did nothing, the names would be refused


class KerasEvaluator(_NamesKept, FrameworkEvaluator):
    """Scores the global model in a Keras model, on the server's data.

    Args:
        model: A model that is built; what the weights are loaded into. Variables that the global model lacks stay as
            they are.
        data: Arrays `(x, y)` (then `batch_size` counts), a `keras.utils.PyDataset`, or any iterable of batches `(x, y)`
            that can be read again and again, such as a `tf.data.Dataset`. `x` and `y` may be lists or dicts, where the
            model has several inputs or outputs; arrays `([a, b], [c, d])` might be two batches, and must be dicts.
        metric: `"accuracy"` (of classes, the last axis of the outputs), `"loss"`, or a function `f(y_true, y_pred)`
            that gives a number for each example or their mean; the score is the mean over all examples. Or a
            `keras.metrics.Metric`. Functions of Keras itself take targets `(n,)` of outputs `(n, 1)` as losses do; a
            function of your own gets them as they are.
        loss: What is behind `"loss"`, as `compile` takes it: a Keras loss, its name, a function, or several of them for
            several outputs. None: the loss that the model was compiled with, and what its layers add, such as
            regularization (on JAX that of weights alone): what `model.evaluate` reports.
        batch_size: Examples in a batch of arrays.
        layout: The map of `fl.align` from the global model to this one, if they are not alike.
        mode: `"max"`, or `"min"` where less of the metric is better; None: as of `KerasLearner`.

    Raises:
        ValueError: The metric is a name that is not known, there is no loss for it, `batch_size` is not at least 1, or
            `data` may be arrays as well as two batches.
        TypeError: `data` can be read once only, or `batch_size` is not an int.

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
        mode: str | None = None,
    ) -> None:
        _check_keras3(model, "KerasEvaluator")
        _check_data(data)
        _check_metric(metric, model, loss)
        super().__init__(model, data, metric, loss=loss, batch_size=batch_size, layout=layout, mode=mode)

    def score(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        return evaluate(self.model, self.data, metrics, loss=self.loss, batch_size=self.batch_size)


class KerasLearner(_NamesKept, FrameworkLearner):
    """Trains and validates a compiled Keras model, as the work of a client.

    Each round starts from the global weights, with the optimizer as it was when the learner was made. The order of the
    examples of arrays depends on the seed and the round alone; other data keep their own. A model that draws at random
    (by dropout) should get seeds of its own.

    Args:
        model: This client's own: built, and compiled with an optimizer and a loss. Variables that the global model
            lacks stay local.
        data: To train on; see `KerasEvaluator`.
        validation_data: To select models by: not the same.
        epochs: Passes over the data in a round.
        batch_size: Examples in a step, where `data` are arrays, and in a batch of `validation_data` likewise.
        metrics: What `validate` scores: names, or a dict of names to metrics as `KerasEvaluator` takes.
        validation_metric: The one by which models are selected.
        mode: `"max"`, or `"min"` where less of it is better. None: `"max"` for `"accuracy"`, `"min"` for `"loss"`; else
            the name of the metric decides (see `fed_learn.components.direction`).
        layout: See `KerasEvaluator`.
        seed: Of the order of the examples; give each client its own.

    Raises:
        ValueError: The model is not compiled, a number is out of its range, a metric is not known, or
            `validation_metric` is not one of them.
        TypeError: Data can be read once only, or a number is not an int.

    Warns:
        UserWarning: `validation_metric` looks like a loss under `mode="max"`.

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
        mode: str | None = None,
        layout: LayoutMap | None = None,
        seed: int = 0,
    ) -> None:
        _check_keras3(model, "KerasLearner")
        if not getattr(model, "compiled", False) or getattr(model, "optimizer", None) is None:
            raise ValueError("the model is not compiled: call its compile() with an optimizer and a loss")
        _check_data(data)
        _check_data(validation_data)
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
        self._renew_optimizer()

        def step(batch: tuple[Any, Any]) -> tuple[float, int]:
            x, y = batch
            return float(self.model.train_on_batch(x, y, return_dict=True)["loss"]), count_of(x, y)

        return step

    def epoch(self, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
        yield from _batches(self.data, self.batch_size, rng)
        if isinstance(self.data, keras.utils.PyDataset):
            self.data.on_epoch_end()

    def score(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        return evaluate(self.model, self.validation_data, metrics, batch_size=self.batch_size)

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
        return {**super().__getstate__(), "_optimizer": None}  # the model brings its own


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
        ValueError: There are no examples, outputs and targets are nothing of which `"accuracy"` can be told, or a
            function gives something else than a number for each example or their mean.
    """
    scores = {name: _score_of(name, metric, model, loss) for name, metric in metrics.items()}
    return score_batches(scores, (Batch(x, y, _outputs(model, x)) for x, y in _batches(data, batch_size, None)))


def _check_keras3(model: object, who: str) -> None:
    """Refuses models of Keras 2, which have other methods."""
    if isinstance(model, keras2_layer()):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(
            f"{who} takes a model of Keras 3, not a {kind}; a Learner of your own, with fl.get_weights and "
            "fl.set_weights, trains any model"
        )


def _score_of(name: str, metric: Metric, model: keras.Model, loss: Any) -> Score:
    if isinstance(metric, keras.metrics.Metric):
        metric.reset_state()
        return KeptScore(
            lambda batch: metric.update_state(batch.targets, batch.outputs),
            lambda: float(_array(metric.result()).astype(np.float64).mean()),
        )
    if metric == "accuracy":
        return MeanScore(name, lambda batch: _hits(batch.targets, batch.outputs), _array)
    if metric != "loss" and not str(getattr(metric, "__module__", "")).startswith("keras."):
        return MeanScore(name, lambda batch: metric(batch.targets, batch.outputs), _array)
    chosen = loss if metric == "loss" else metric
    holder = model if chosen is None else _compiled(chosen, model)
    return MeanScore(name, lambda batch: _loss(holder, batch), _array)


def _compiled(loss: Any, model: keras.Model) -> keras.Model:
    """A model that has nothing but this loss: Keras shows in no other public way how it would take it."""
    holder = keras.Model(name="loss")
    names = getattr(model, "output_names", None)
    if names:
        holder.output_names = names
    holder.compile(optimizer=None, loss=loss)
    return holder


def _loss(holder: keras.Model, batch: Batch) -> Any:
    return holder.compute_loss(x=batch.inputs, y=batch.targets, y_pred=batch.outputs, training=False)


def _outputs(model: keras.Model, x: Any) -> Any:
    # On TensorFlow predict_on_batch would be traced for each model and size of batch, which TensorFlow counts over all
    # models and warns of. On the others it keeps gradients out.
    return model(x, training=False) if keras.backend.backend() == "tensorflow" else model.predict_on_batch(x)


def _hits(targets: Any, outputs: Any) -> Array:
    if not any(isinstance(part, Mapping) or _is_group(part) for part in (targets, outputs)):
        true, given = _array(targets), _array(outputs)
        if given.ndim >= 2 and given.shape[-1] >= 2 and given.shape[:-1] == true.shape and true.dtype.kind != "f":
            hits: Array = given.argmax(axis=-1) == true
            return hits
    raise ValueError(
        f"'accuracy' is that of outputs (examples, …, classes) and integer targets (examples, …), not of "
        f"{form_of(outputs)} and {form_of(targets)}; give a function as the metric, such as "
        "keras.metrics.binary_accuracy"
    )


def _check_loss(model: keras.Model, loss: Any) -> None:
    chosen = loss if loss is not None else getattr(model, "loss", None)
    if chosen is None:
        raise ValueError("'loss' needs one: compile the model with a loss, or give loss=")
    for one in keras.tree.flatten(chosen):
        if isinstance(one, str) and one.lower() not in ("crossentropy", "ce"):  # which depend on the data
            keras.losses.get(one)


def _array(value: Any) -> Array:
    array: Array = np.asarray(keras.ops.convert_to_numpy(value))
    return array


def _batches(data: Data, batch_size: int, rng: np.random.Generator | None) -> Iterator[tuple[Any, Any]]:
    """Batches of the data; in a random order where they are arrays, and `rng` is given."""
    if _are_arrays(data):
        count = len(next(tensors_in(data)))
        chosen = in_order(count, batch_size) if rng is None else shuffled(count, batch_size, rng)
        for c in chosen:
            yield keras.tree.map_structure(lambda array, c=c: array[c], tuple(data))
    elif isinstance(data, keras.utils.PyDataset):
        yield from (pair_of(data[number]) for number in range(len(data)))
    else:
        yield from map(pair_of, data)


def _are_arrays(data: Data) -> bool:
    """Whether they are `(x, y)`, where each is an array, or a list or dict of arrays; not batches `(x, y)`."""
    if not isinstance(data, tuple | list) or len(data) != 2 or all(map(_is_group, data)):
        return False
    leaves = [keras.tree.flatten(part) for part in data]
    return all(leaves) and all(isinstance(leaf, np.ndarray) for part in leaves for leaf in part)


def _is_group(part: Any) -> bool:
    return isinstance(part, tuple | list) and any(True for _ in tensors_in(part))


def _check_metric(metric: Metric, model: keras.Model, loss: Any) -> None:
    if isinstance(metric, str) and metric == "loss":
        _check_loss(model, loss)
    elif metric != "accuracy" if isinstance(metric, str) else not callable(metric):
        raise ValueError(f"a metric must be 'accuracy', 'loss' or a function, not {metric!r}")


def _check_data(data: Data) -> None:
    if _are_arrays(data):
        (x, y), counts = data, {len(array) for array in tensors_in(data)}
        if len(counts) > 1:
            raise ValueError(f"inputs and targets are not equally many: {form_of(x)} and {form_of(y)}")
    elif isinstance(data, tuple) and len(data) == 2 and all(map(_is_group, data)):
        raise ValueError(
            f"data may be arrays (x, y) or two batches: {form_of(data[0])} and {form_of(data[1])}; "
            "give several inputs or outputs as dicts, and batches in a list"
        )
    elif not isinstance(data, keras.utils.PyDataset):
        check_repeatable(data)
