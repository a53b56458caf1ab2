"""A torch model in a federation: `TorchEvaluator` scores the global model, `TorchLearner` is the work of a client.

Server validation takes three lines:

    evaluator = TorchEvaluator(model, DataLoader(validation_data, batch_size=256))
    handlers = [ServerValidationHandler(evaluator, num_rounds_per_valid=1)]
    server = fl.FederatedServer(fl.get_weights(model), num_rounds=20, handlers=handlers)

An evaluator and each learner need a model of their own: the weights in it are overwritten.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fed_learn.adapters.layout import LayoutMap
from fed_learn.errors import a_type
from fed_learn.integrations.batches import check_repeatable, count_of, form_of, in_order, pair_of, shuffled
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

Data: TypeAlias = "Dataset[Any] | DataLoader[Any] | Iterable[Any]"
"""A `Dataset` of `(input, target)`, or what yields batches `(inputs, targets)` each time it is iterated over."""

Metric: TypeAlias = Any
"""`"accuracy"`, `"loss"`, a function of outputs and targets, or an object with `reset`, `update` and `compute`."""


class TorchEvaluator(FrameworkEvaluator):
    """Scores the global model in a torch model, on the server's data.

    The model is put into `eval` mode, without gradients, and back into the modes it was in.

    Args:
        model: What the weights are loaded into. Variables that the global model lacks stay as they are.
        data: A `Dataset` (then `batch_size` counts), a `DataLoader`, or any iterable of batches `(inputs, targets)`
            that can be read again and again. Where inputs are a tuple, list or dict, the model gets them as arguments.
            Targets may be a tuple, list or dict of tensors as well, or a list of dicts, one for each example.
        metric: `"accuracy"` (of classes, dimension 1 of the outputs), `"loss"`, or a function of outputs and targets
            that gives a number for each example or their mean; the score is the mean over all examples. Or an object
            with `reset()`, `update(outputs, targets)` and `compute()`, as those of torchmetrics.
        loss: The function behind `"loss"`, with the signature of a metric.
        batch_size: Examples in a batch of a `Dataset`.
        device: Where the model goes, and the batches with it; None: where the model is.
        layout: The map of `fl.align` from the global model to this one, if they are not alike.
        mode: `"max"`, or `"min"` where less of the metric is better; None: as of `TorchLearner`.

    Raises:
        ValueError: The metric is a name that is not known, or `batch_size` is not at least 1.
        TypeError: `data` can be read once only, or `batch_size` is not an int.

    Example:
        >>> from fed_learn import FLContext, ModelData
        >>> data = TensorDataset(torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([0, 0, 1]))
        >>> evaluator = TorchEvaluator(torch.nn.Linear(1, 2, bias=False), data)
        >>> evaluator.evaluate(FLContext(model=ModelData({"weight": np.float32([[1], [0]])})))
        >>> round(evaluator.get_metric(), 4)
        0.3333
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: Data,
        metric: Metric = "accuracy",
        *,
        loss: Callable[[Any, Any], Any] = functional.cross_entropy,
        batch_size: int = 256,
        device: torch.device | str | None = None,
        layout: LayoutMap | None = None,
        mode: str | None = None,
    ) -> None:
        _check_data(data)
        _check_metric(metric)
        super().__init__(model, data, metric, loss=loss, batch_size=batch_size, layout=layout, mode=mode)
        self.device = device
        if device is not None:
            model.to(device)

    def score(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        return evaluate(self.model, self.data, metrics, loss=self.loss, batch_size=self.batch_size)


class TorchLearner(FrameworkLearner):
    """Trains and validates a torch model, as the work of a client.

    Each round starts from the global weights, with a new optimizer. The model is put into `train` mode; parts that are
    in `eval` mode while the model itself is not, such as a frozen BatchNorm, stay so. The order of a `Dataset`'s
    examples depends on the seed and the round alone; a `DataLoader` keeps its own (give it a `generator`). A model that
    draws at random, by dropout, draws from torch's generator, which clients in one process share: for the same bits in
    every run these take turns, `server.run(clients, max_workers=1)`.

    Args:
        model: This client's own. Variables that the global model lacks stay local.
        data: To train on; see `TorchEvaluator`.
        validation_data: To select models by: not the same.
        optimizer: Makes the optimizer of a round from the parameters that need gradients, such as
            `lambda parameters: torch.optim.Adam(parameters, lr=1e-3)`; None: plain SGD, `lr=0.01`.
        loss: A function of outputs and targets, the mean over the batch.
        epochs: Passes over the data in a round.
        batch_size: Examples in a step, where `data` is a `Dataset`, and in a batch of `validation_data` likewise.
        metrics: What `validate` scores: names, or a dict of names to metrics as `TorchEvaluator` takes.
        validation_metric: The one by which models are selected.
        mode: `"max"`, or `"min"` where less of it is better. None: `"max"` for `"accuracy"`, `"min"` for `"loss"`, as a
            metric of torchmetrics says of itself; else its name decides (see `fed_learn.components.direction`).
        device: See `TorchEvaluator`.
        layout: See `TorchEvaluator`.
        seed: Of the order of the examples; give each client its own.

    Raises:
        ValueError: A number is out of its range, a metric is not known, or `validation_metric` is not one of them.
        TypeError: Data can be read once only, a number is not an int, or `optimizer` is none that can be called.

    Warns:
        UserWarning: `validation_metric` looks like a loss under `mode="max"`.

    Example:
        >>> import fed_learn as fl
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> data = TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = torch.nn.Linear(1, 2)
        >>> learner = TorchLearner(model, data, data, epochs=20, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        >>> server = fl.FederatedServer(fl.get_weights(model), num_rounds=2)
        >>> result = server.run([fl.FederatedClient("site-1", learner)])
        >>> learner.validate(result.weights, fl.FLContext())["accuracy"] > 0.9
        True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: Data,
        validation_data: Data,
        *,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
        loss: Callable[[Any, Any], Any] = functional.cross_entropy,
        epochs: int = 1,
        batch_size: int = 32,
        metrics: Sequence[str] | Mapping[str, Metric] = ("accuracy", "loss"),
        validation_metric: str = "accuracy",
        mode: str | None = None,
        device: torch.device | str | None = None,
        layout: LayoutMap | None = None,
        seed: int = 0,
    ) -> None:
        _check_data(data)
        _check_data(validation_data)
        _check_optimizer(optimizer)
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
            _check_metric(metric)
        self.optimizer = optimizer
        self.loss = loss
        self.device = device
        if device is not None:
            model.to(device)

    def begin(self) -> Step:
        device = _device_of(self.model)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.01) if self.optimizer is None else self.optimizer(parameters)
        _to_training(self.model)

        def step(batch: Any) -> tuple[float, int]:
            x, y = _moved(pair_of(batch), device)
            optimizer.zero_grad()
            loss = self.loss(_outputs(self.model, x), y)
            loss.backward()
            optimizer.step()
            return float(loss.detach()), count_of(x, y)

        return step

    def epoch(self, rng: np.random.Generator) -> Iterator[Any]:
        return _batches(self.data, self.batch_size, rng)

    def score(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        return evaluate(self.model, self.validation_data, metrics, loss=self.loss, batch_size=self.batch_size)


def evaluate(
    model: torch.nn.Module,
    data: Data,
    metrics: Mapping[str, Metric],
    *,
    loss: Callable[[Any, Any], Any] = functional.cross_entropy,
    batch_size: int = 256,
) -> dict[str, float]:
    """Scores a model as it is; arguments as of `TorchEvaluator`.

    Returns:
        The score by the name of each metric.

    Raises:
        ValueError: There are no examples, outputs and targets are nothing of which `"accuracy"` can be told, or a
            function gives something else than a number for each example or their mean.
    """
    scores = {name: _score_of(name, metric, loss) for name, metric in metrics.items()}
    device = _device_of(model)
    with _evaluating(model), torch.no_grad():
        batches = (_moved(pair_of(batch), device) for batch in _batches(data, batch_size, None))
        return score_batches(scores, (Batch(x, y, _outputs(model, x)) for x, y in batches))


def _score_of(name: str, metric: Metric, loss: Callable[[Any, Any], Any]) -> Score:
    if isinstance(metric, str):
        function = {"accuracy": _hits, "loss": loss}[metric]
    elif _keeps_state(metric):
        metric.reset()
        return KeptScore(lambda batch: metric.update(batch.outputs, batch.targets), lambda: float(metric.compute()))
    else:
        function = metric
    return MeanScore(name, lambda batch: function(batch.outputs, batch.targets), _array)


def _hits(outputs: Any, targets: Any) -> torch.Tensor:
    if not (
        isinstance(outputs, torch.Tensor)
        and isinstance(targets, torch.Tensor)
        and outputs.ndim == targets.ndim + 1 >= 2
        and outputs.shape[1] >= 2
        and outputs.shape[:1] + outputs.shape[2:] == targets.shape
        and not targets.is_floating_point()
    ):
        raise ValueError(
            "'accuracy' is that of outputs (examples, classes, …) and integer targets (examples, …), not of "
            f"{form_of(outputs)} and {form_of(targets)}; give a function as the metric"
        )
    return outputs.argmax(dim=1) == targets


def _array(value: Any) -> Array:
    """The value in float64, on the host, where every device has it."""
    array: Array = torch.as_tensor(value).detach().cpu().double().numpy()
    return array


def _batches(data: Data, batch_size: int, rng: np.random.Generator | None) -> Iterator[Any]:
    """Batches of the data; in a random order where they can be had in any, and `rng` is given."""
    if not isinstance(data, Dataset):
        yield from data
        return
    own = torch.Generator()  # a loader without one draws from the generator of the whole process
    if isinstance(data, IterableDataset):
        yield from DataLoader(data, batch_size, generator=own)
        return
    count = len(data)  # type: ignore[arg-type] # Dataset has no __len__, those with an order have
    chosen: Iterable[Any] = in_order(count, batch_size) if rng is None else shuffled(count, batch_size, rng)
    if type(data) is TensorDataset:
        yield from (data[torch.from_numpy(c) if isinstance(c, np.ndarray) else c] for c in chosen)
        return
    listed = [list(range(c.start, c.stop)) if isinstance(c, slice) else c.tolist() for c in chosen]
    yield from DataLoader(data, batch_sampler=listed, generator=own)


def _outputs(model: torch.nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return tuple(_moved(item, device) for item in value) if isinstance(value, tuple | list) else value


def _device_of(model: torch.nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _to_training(model: torch.nn.Module) -> None:
    """`train` mode, but for parts that are in `eval` mode in a model that is not: they are frozen."""
    frozen = [module for module in model.modules() if not module.training] if model.training else []
    model.train()
    for module in frozen:
        module.training = False


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """`eval` mode; afterwards each module is in its own mode again, since parts may be frozen in another."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _keeps_state(metric: Metric) -> bool:
    return all(callable(getattr(metric, name, None)) for name in ("reset", "update", "compute"))


def _check_metric(metric: Metric) -> None:
    known = metric in ("accuracy", "loss") if isinstance(metric, str) else _keeps_state(metric) or callable(metric)
    if not known:
        raise ValueError(f"a metric must be 'accuracy', 'loss' or a function, not {metric!r}")


def _check_data(data: Data) -> None:
    if not isinstance(data, Dataset):
        check_repeatable(data)


def _check_optimizer(optimizer: object) -> None:
    if optimizer is None or (callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer)):
        return
    kind, settings = "SGD", "lr=0.01"
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        settings = f"lr={optimizer.defaults.get('lr', 0.01)}"
    raise TypeError(
        f"optimizer must be a function that makes the optimizer of a round, not {a_type(type(optimizer))}: pass "
        f"optimizer=lambda parameters: torch.optim.{kind}(parameters, {settings})"
    )
