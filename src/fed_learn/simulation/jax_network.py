"""The demo's network in plain JAX: a tree of arrays, and functions of it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fed_learn.components import Learner, ModelEvaluator, TrainingResult
from fed_learn.integrations.batches import Mean, shuffled
from fed_learn.integrations.loading import weights_in
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.simulation.datasets import Part
from fed_learn.simulation.network import BATCH_SIZE, DECAY, EPSILON, LEARNING_RATE, MOMENTUM, Architecture, Network
from fed_learn.weights import Array, WeightDict

Tree = dict[str, Any]
STATISTICS = ("running_mean", "running_var")


class JaxNetwork(Network):
    """The demo's network in plain JAX."""

    framework = "jax"

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self.architecture = architecture
        self.seed = seed

    def init(self) -> dict[str, Array]:
        """The initial global weights: `conv1.kernel`, `norm1.scale`, …, the running statistics among them."""
        kernels = self.architecture.initial_kernels(self.seed)
        weights: dict[str, Array] = {}
        for number, (name, kernel) in enumerate(kernels.items(), start=1):
            size = kernel.shape[-1]
            weights[f"{name}.kernel"] = kernel
            if number > 2 or name == "output":
                weights[f"{name}.bias"] = np.zeros(size, np.float32)
                continue
            for leaf, value in (("scale", 1), ("offset", 0), ("running_mean", 0), ("running_var", 1)):
                weights[f"norm{number}.{leaf}"] = np.full(size, value, np.float32)
        return weights

    def learner(self, train: Part, selection: Part, *, local_epochs: int, seed: int) -> Learner:
        return JaxLearner(self, train, selection, local_epochs=local_epochs, seed=seed)

    def evaluator(self, part: Part) -> ModelEvaluator:
        return JaxEvaluator(self, part)

    def score(self, weights: WeightDict, part: Part) -> dict[str, float]:
        tree = {name: jnp.asarray(array) for name, array in weights.items()}
        log_p = np.asarray(_predict(tree, self.architecture.shaped(part)))
        return {
            "accuracy": float((log_p.argmax(axis=1) == part.y).mean()),
            "loss": float(-log_p[np.arange(len(part)), part.y].mean()),
        }

    def one_thread(self) -> AbstractContextManager[Any]:
        """Does nothing: JAX's threads are set for good when it starts, and do not change results."""
        return nullcontext()


class JaxLearner(Learner):
    """Trains the network by mini-batch gradient descent with momentum.

    Args:
        network: The network.
        training_part: Examples to train on.
        selection_part: Examples to select models by.
        local_epochs: Passes over the training part in a round.
        seed: Of the order of the examples; give each client its own.
    """

    mode = "max"

    def __init__(
        self, network: JaxNetwork, training_part: Part, selection_part: Part, *, local_epochs: int = 5, seed: int = 0
    ) -> None:
        self.network = network
        self.training_part = training_part
        self.selection_part = selection_part
        self.local_epochs = local_epochs
        self.seed = seed

    def train(self, weights: WeightDict, ctx: FLContext) -> TrainingResult:
        """Trains from `weights`. The aggregation weight is the number of examples."""
        rng = np.random.default_rng([self.seed, ctx[ContextKey.ROUND]])
        x, y = self.network.architecture.shaped(self.training_part), self.training_part.y.astype(np.int32)
        tree = {name: jnp.asarray(array) for name, array in weights.items()}
        velocity = {name: jnp.zeros_like(leaf) for name, leaf in tree.items() if not name.endswith(STATISTICS)}
        losses, steps, step = Mean(), 0, _step()
        for _ in range(self.local_epochs):
            for batch in shuffled(len(y), BATCH_SIZE, rng):
                tree, velocity, loss = step(tree, velocity, x[batch], y[batch])
                losses.add(float(loss), len(batch))
                steps += 1
        trained = {name: np.array(tree[name]) for name in weights}
        return TrainingResult(trained, len(y), steps, {"train_loss": losses.value()})

    def validate(self, weights: WeightDict, ctx: FLContext) -> Mapping[str, float]:
        """Accuracy and loss of `weights` on the selection part."""
        return self.network.score(weights, self.selection_part)


class JaxEvaluator(ModelEvaluator):
    """Scores the network on the server's validation part.

    Args:
        network: The network.
        part: The examples.
    """

    metric_name = "accuracy"
    mode = "max"

    def __init__(self, network: JaxNetwork, part: Part) -> None:
        self.network = network
        self.part = part
        self._metric = float("nan")

    def evaluate(self, ctx: FLContext) -> None:
        self._metric = self.network.score(weights_in(ctx), self.part)[self.metric_name]

    def get_metric(self) -> float:
        """The accuracy."""
        return self._metric


def forward(tree: Tree, x: Any, *, training: bool) -> tuple[Any, Tree]:
    """Log-probabilities of the classes, and the running statistics: new ones in training, else none."""
    statistics: Tree = {}

    def normalized(x: Any, name: str) -> Any:
        mean, var = tree[f"{name}.running_mean"], tree[f"{name}.running_var"]
        if training:
            axes = tuple(range(x.ndim - 1))
            old, (mean, var) = (mean, var), (x.mean(axes), x.var(axes))
            for leaf, kept, new in (("running_mean", old[0], mean), ("running_var", old[1], var)):
                statistics[f"{name}.{leaf}"] = DECAY * kept + (1 - DECAY) * jax.lax.stop_gradient(new)
        return (x - mean) * jax.lax.rsqrt(var + EPSILON) * tree[f"{name}.scale"] + tree[f"{name}.offset"]

    def convolved(x: Any, name: str, stride: int) -> Any:
        return jax.lax.conv_general_dilated(
            x,
            tree[f"{name}.kernel"],
            window_strides=(stride, stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    if "conv1.kernel" in tree:
        x = jax.nn.relu(normalized(convolved(x, "conv1", 1), "norm1"))
        x = jax.nn.relu(normalized(convolved(x, "conv2", 2), "norm2"))
        x = jax.nn.relu(x.reshape(len(x), -1) @ tree["dense1.kernel"] + tree["dense1.bias"])
    else:
        x = jax.nn.relu(normalized(x @ tree["dense1.kernel"], "norm1"))
        x = jax.nn.relu(normalized(x @ tree["dense2.kernel"], "norm2"))
    return jax.nn.log_softmax(x @ tree["output.kernel"] + tree["output.bias"]), statistics


@cache  # compiled once for all clients
def _step() -> Callable[[Tree, Tree, Any, Any], tuple[Tree, Tree, Any]]:
    def loss_of(trained: Tree, statistics: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        log_p, new = forward({**statistics, **trained}, x, training=True)
        return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean(), new

    def step(tree: Tree, velocity: Tree, x: Any, y: Any) -> tuple[Tree, Tree, Any]:
        trained = {name: tree[name] for name in velocity}
        kept = {name: leaf for name, leaf in tree.items() if name not in velocity}
        (loss, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained, kept, x, y)
        velocity = {name: MOMENTUM * velocity[name] - LEARNING_RATE * gradients[name] for name in velocity}
        return {**new, **{name: trained[name] + velocity[name] for name in velocity}}, velocity, loss

    return jax.jit(step)


@jax.jit
def _predict(tree: Tree, x: Any) -> Any:
    return forward(tree, x, training=False)[0]
