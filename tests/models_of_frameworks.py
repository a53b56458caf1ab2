"""Small models of every framework, and how each is trained and read by its own means: what adapters must take."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fed_learn.weights import BFLOAT16, Array

LETTERS = {"trained": "t", "statistic": "s", "counter": "n", "constant": "k", "code": "c", None: "."}
"""How the roles of variables are written below."""
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax", "equinox")
Model = Any
Weights = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """A kind of model.

    Attributes:
        id: What it is.
        needs: The frameworks without which it cannot be made.
        make: A new one with random values, of a seed.
        train: A real step of training; returns the model, a new one where models do not change.
        read: Its values, by the framework's own means.
        names: What they must be called, in this order.
        trainable, roles: What must be told of each variable; None: nothing is known.
        live: Whether reading without a copy gives views that follow the model.
    """

    id: str
    needs: tuple[str, ...]
    make: Callable[[int], Model]
    train: Callable[[Model], Model]
    read: Callable[[Model], Weights]
    names: str
    trainable: str
    roles: str
    live: bool = False

    @property
    def in_place(self) -> bool:
        """Whether loading changes the model itself."""
        return "jax" not in self.needs


def parameters() -> Iterator[Any]:
    """All cases, for `parametrize`; those whose framework is missing are skipped."""
    for case in (*TORCH, *KERAS, *TENSORFLOW, *JAX):
        missing = [name for name in case.needs if importlib.util.find_spec(name) is None]
        marks = [pytest.mark.skip(reason=f"{', '.join(missing)} is not installed")] if missing else []
        yield pytest.param(case, id=case.id, marks=marks)


def noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# torch


def torch_net(seed: int, dtype: str = "float32") -> Model:
    """Convolution, BatchNorm and tied layers; with float16 and bfloat16 what CPUs can compute."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    if dtype != "float32":
        half = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 2)).to(getattr(torch, dtype))
        half.register_buffer("seen", torch.tensor(seed, dtype=torch.uint8))
        return half
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    net[4].weight = net[3].weight
    net.register_buffer("mask", torch.arange(3) % 2 == seed % 2)
    net.register_buffer("scratch", torch.zeros(3), persistent=False)
    net[0].weight.requires_grad_(False)
    return net


def torch_train(model: Model) -> Model:
    import torch

    net: Any = getattr(model, "_orig_mod", getattr(model, "module", model))
    like = next(net.parameters())
    data = torch.from_numpy(noise(1, 4, 5)) if like.dim() == 2 else torch.from_numpy(noise(1, 4, 1, 3, 3))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    net(data.to(like.dtype)).square().mean().backward()
    optimizer.step()
    return model


def torch_state(seed: int) -> Model:
    net = torch_net(seed)
    state = net.state_dict()
    state.net = net
    return state


def torch_train_state(state: Model) -> Model:
    torch_train(state.net)
    return state


def torch_read(model: Model) -> Weights:
    import torch

    state = model if isinstance(model, dict) else model.state_dict()
    return {
        name.removeprefix("_orig_mod.").removeprefix("module."): (
            tensor.view(torch.int16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        ).copy()
        for name, tensor in state.items()
    }


def torch_compiled(seed: int) -> Model:
    import torch

    # A back end that needs no compiler; none is run here.
    return torch.compile(torch_net(seed), backend="eager")


def torch_parallel(seed: int) -> Model:
    import torch

    return torch.nn.DataParallel(torch_net(seed))


def resnet50_shapes() -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """The shape and dtype of all that torchvision's ResNet-50 has in its `state_dict`: 320 tensors, 25.6 M elements."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_and_norm(conv: str, norm: str, out: int, into: int, size: int) -> None:
        shapes[f"{conv}.weight"] = (out, into, size, size)
        shapes.update({f"{norm}.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv_and_norm("conv1", "bn1", 64, 3, 7)
    into = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 << stage
        for block in range(blocks):
            prefix = f"layer{stage + 1}.{block}"
            conv_and_norm(f"{prefix}.conv1", f"{prefix}.bn1", inner, into, 1)
            conv_and_norm(f"{prefix}.conv2", f"{prefix}.bn2", inner, inner, 3)
            conv_and_norm(f"{prefix}.conv3", f"{prefix}.bn3", 4 * inner, inner, 1)
            if block == 0:
                conv_and_norm(f"{prefix}.downsample.0", f"{prefix}.downsample.1", 4 * inner, into, 1)
            into = 4 * inner
    shapes |= {"fc.weight": (1000, into), "fc.bias": (1000,)}
    return {name: (shape, np.dtype(np.float32 if shape else np.int64)) for name, shape in shapes.items()}


NET = (
    "mask 0.weight 0.bias 1.weight 1.bias 1.running_mean 1.running_var 1.num_batches_tracked "
    "3.weight 3.bias 4.weight 4.bias 5.weight 5.bias"
)
HALF = "seen 0.weight 0.bias 1.weight 1.bias 2.weight 2.bias"
# One letter for each variable: yes, no; see `LETTERS`; a dot for what is not known.
TORCH = [
    Case(name, ("torch",), make, train, torch_read, NET, trainable, roles, live=True)
    for name, make, train, trainable, roles in (
        ("torch module", torch_net, torch_train, "nnyyynnnyyyyyy", "kttttssntttttt"),
        ("torch compiled", torch_compiled, torch_train, "nnyyynnnyyyyyy", "kttttssntttttt"),
        ("torch DataParallel", torch_parallel, torch_train, "nnyyynnnyyyyyy", "kttttssntttttt"),
        ("torch state_dict", torch_state, torch_train_state, "." * 14, "k....ssn......"),
    )
] + [
    Case(
        f"torch {dtype}",
        ("torch",),
        functools.partial(torch_net, dtype=dtype),
        torch_train,
        torch_read,
        HALF,
        "nyyyyyy",
        "ntttttt",
        live=True,
    )
    for dtype in ("float16", "bfloat16")
]

# Keras


def keras_layers(policy: str | None = None) -> list[Any]:
    """Layers whose variables are a dense layer's, the four of BatchNorm, a seed, and a frozen layer's."""
    from keras import layers

    return [
        layers.Dense(6, name="first", dtype=policy),
        layers.BatchNormalization(name="norm", dtype=policy),
        layers.Dropout(0.3, seed=1, name="drop", dtype=policy),
        layers.Dense(4, name="frozen", trainable=False, dtype=policy),
        layers.Dense(2, name="last", dtype=policy),
    ]


def keras_model(seed: int, kind: str, policy: str | None = None) -> Model:
    import keras

    keras.utils.set_random_seed(seed)
    if kind == "sequential":
        model = keras.Sequential([keras.Input((5,)), *keras_layers(policy)], name="net")
    elif kind == "subclassed":

        class Net(keras.Model):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__(name="net")
                self.steps = keras_layers(policy)

            def call(self, x: Any, training: bool = False) -> Any:
                for step in self.steps:
                    x = step(x, training=training) if step.name in ("norm", "drop") else step(x)
                return x

        model = Net()
        model(noise(0, 1, 5))
    else:
        whole = inputs = keras.Input((5,))
        steps = keras_layers(policy)
        if kind == "nested":
            steps = [keras.Sequential([keras.Input((5,)), *steps[:3]], name="inner"), *steps[3:]]
        for step in steps:
            whole = step(whole)
        model = keras.Model(inputs, whole, name="net")
    # Kept: Keras adds to it what metrics, losses and optimizers count.
    model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"], run_eagerly=kind != "functional")
    return model


def keras_train(model: Model) -> Model:
    model.train_on_batch(noise(1, 8, 5), noise(2, 8, 2))
    return model


def keras_read(model: Model) -> Weights:
    return {variable.path: np.array(variable.numpy()) for variable in model.weights}


def keras_names(prefix: str, inner: str = "") -> str:
    first = [f"{inner}first/kernel", f"{inner}first/bias", f"{inner}norm/gamma", f"{inner}norm/beta"]
    first += [f"{inner}norm/moving_mean", f"{inner}norm/moving_variance"]
    last = ["frozen/kernel", "frozen/bias", "last/kernel", "last/bias"]
    return " ".join([*first, *(prefix + name for name in last)] if inner else [prefix + n for n in first + last])


KERAS = [
    Case(
        f"keras {kind}" + (f" {policy}" if policy else ""),
        ("keras", "tensorflow"),
        functools.partial(keras_model, kind=kind, policy=policy),
        keras_train,
        keras_read,
        names,
        "yyyynnnnyy",
        "ttttsstttt",
    )
    for kind, policy, names in (
        ("sequential", None, keras_names("net/")),
        ("functional", None, keras_names("")),
        ("subclassed", None, keras_names("net/")),
        ("nested", None, keras_names("", "inner/")),
        ("functional", "mixed_bfloat16", keras_names("")),
        ("sequential", "mixed_float16", keras_names("net/")),
        ("functional", "bfloat16", keras_names("")),
    )
]

# TensorFlow


def tensorflow_module(seed: int) -> Model:
    import tensorflow as tf

    class Layer(tf.Module):  # type: ignore[misc]
        def __init__(self, w: Any, b: Any) -> None:
            super().__init__()
            self.w, self.b = tf.Variable(w), tf.Variable(b)

        def __call__(self, x: Any) -> Any:
            return x @ self.w + tf.cast(self.b, tf.float32)

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Layer(noise(seed, 5, 4), noise(seed + 1, 4).astype(BFLOAT16))]
            self.heads = {"one": Layer(noise(seed + 2, 4, 2), noise(seed + 3, 2).astype(np.float16))}
            self.tied = self.layers[0].w
            self.steps = tf.Variable(seed, dtype=tf.int64, trainable=False)
            self.what = "not a variable"

        @tf.function  # type: ignore[untyped-decorator]
        def train(self, x: Any) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.heads["one"](self.layers[0](x))))
            for variable, gradient in zip(
                self.trainable_variables, tape.gradient(loss, self.trainable_variables), strict=True
            ):
                variable.assign_sub(tf.cast(0.5, gradient.dtype) * gradient)
            self.steps.assign_add(1)

    return Net()


def tensorflow_train(model: Model) -> Model:
    model.train(noise(1, 8, 5))
    return model


def tensorflow_read(model: Model) -> Weights:
    first, head = model.layers[0], model.heads["one"]
    values = (model.steps, model.tied, head.b, head.w, first.b, first.w)
    return {name: np.array(v.numpy()) for name, v in zip(MODULE.split(), values, strict=True)}


def tensorflow_list(seed: int) -> Model:
    import tensorflow as tf

    return [tf.Variable(noise(seed, 5, 2), name="kernel"), tf.Variable(noise(seed + 1, 2)), tf.Variable(seed)]


def tensorflow_train_list(model: Model) -> Model:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(noise(1, 8, 5) @ model[0] + model[1]))
    for variable, gradient in zip(model[:2], tape.gradient(loss, model[:2]), strict=True):
        variable.assign_sub(0.5 * gradient)
    model[2].assign_add(1)
    return model


def tensorflow_read_list(model: Model) -> Weights:
    return {f"{i}/{v.name[:-2]}": np.array(v.numpy()) for i, v in enumerate(model)}


MODULE = "steps tied heads/one/b heads/one/w layers/0/b layers/0/w"
TENSORFLOW = [
    Case(
        "tf.Module",
        ("tensorflow",),
        tensorflow_module,
        tensorflow_train,
        tensorflow_read,
        MODULE,
        "nyyyyy",
        "nttttt",
    ),
    Case(
        "list of tf.Variable",
        ("tensorflow",),
        tensorflow_list,
        tensorflow_train_list,
        tensorflow_read_list,
        "0/kernel 1/Variable 2/Variable",
        "yyy",
        "ttn",
    ),
]

# JAX


def jax_dict(seed: int) -> Model:
    import jax.numpy as jnp

    return {
        "layers": [{"w": jnp.asarray(noise(seed, 5, 4))}, {"w": jnp.asarray(noise(seed + 1, 4, 2), jnp.bfloat16)}],
        "activation": np.tanh,
        "scale": noise(seed + 2, 2),
        "epsilon": 1e-5,
        "steps": jnp.asarray(seed, jnp.int32),
    }


def jax_train_dict(model: Model) -> Model:
    import jax
    import jax.numpy as jnp

    def loss(w: Any, scale: Any) -> Any:
        return jnp.square(jnp.tanh(noise(1, 8, 5) @ w[0]) @ w[1].astype(np.float32) * scale).mean()

    w = [layer["w"] for layer in model["layers"]]
    gradients, scale = jax.grad(loss, (0, 1))(w, model["scale"])
    step = jax.jit(lambda w, g: w - g.astype(w.dtype), donate_argnums=0)
    new = [{"w": step(v, g)} for v, g in zip(w, gradients, strict=True)]
    return model | {"layers": new, "scale": np.asarray(model["scale"] - scale), "steps": model["steps"] + 1}


def jax_read_dict(model: Model) -> Weights:
    (a, b), scale, steps = (layer["w"] for layer in model["layers"]), model["scale"], model["steps"]
    return {name: np.array(v) for name, v in zip(DICT.split(), (a, b, scale, steps), strict=True)}


def linen_net() -> Any:
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
            return nn.Dense(2, param_dtype=np.float16)(nn.relu(x))

    return Net()


def linen_model(seed: int) -> Model:
    import jax

    variables = linen_net().init(jax.random.key(seed), noise(0, 1, 5))
    # All that is 0 or 1 at first would not tell two models apart.
    return jax.tree.map(lambda v: v + np.asarray(noise(seed, *v.shape) ** 2, v.dtype), variables)


def linen_train(model: Model) -> Model:
    import jax
    import jax.numpy as jnp

    def loss(params: Any) -> Any:
        out, state = linen_net().apply(model | {"params": params}, noise(1, 8, 5), mutable="batch_stats")
        return jnp.square(out).mean(), state

    gradients, state = jax.grad(loss, has_aux=True)(model["params"])
    return state | {"params": jax.tree.map(lambda p, g: p - (g / 2).astype(p.dtype), model["params"], gradients)}


def linen_read(model: Model) -> Weights:
    from flax import traverse_util

    flatten: Any = traverse_util.flatten_dict
    flat = flatten(model, sep="/")
    return {name: np.array(flat[name]) for name in sorted(flat)}


def nnx_model(seed: int) -> Model:
    import jax.numpy as jnp
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(5, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, param_dtype=np.float16, rngs=rngs)])
            self.again = self.first
            self.count = nnx.Variable(jnp.asarray(seed, jnp.int32))
            self.what = "not a variable"

        def __call__(self, x: Any) -> Any:
            x = self.drop(self.norm(self.first(x)))
            for layer in self.layers:
                x = layer(x)
            return x

    model: Any = Net(nnx.Rngs(seed))
    for number, leaf in enumerate((model.norm.mean, model.norm.scale, model.first.bias)):
        leaf[...] = leaf[...] + noise(seed + number, *leaf.shape)
    return model


def nnx_train(model: Model) -> Model:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    gradients = nnx.grad(lambda net: jnp.square(net(noise(1, 8, 5))).mean())(model)
    new = jax.tree.map(lambda p, g: p - (g / 2).astype(p.dtype), nnx.state(model, nnx.Param), gradients)
    nnx.update(model, new)
    return model


def nnx_read(model: Model) -> Weights:
    from flax import nnx

    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))))
    return {"/".join(map(str, path)): np.array(variable.get_value()) for path, variable in flat.items()}


def equinox_model(seed: int) -> Model:
    import equinox
    import jax

    return equinox.nn.MLP(5, 2, 4, 1, key=jax.random.key(seed))


def equinox_train(model: Model) -> Model:
    import equinox
    import jax
    import jax.numpy as jnp

    gradients = equinox.filter_grad(lambda net: jnp.square(jax.vmap(net)(noise(1, 8, 5))).mean())(model)
    return equinox.apply_updates(model, jax.tree.map(lambda g: -g / 2, gradients))


def equinox_read(model: Model) -> Weights:
    return {f"layers/{i}/{n}": np.array(getattr(layer, n)) for i, layer in enumerate(model.layers) for n in EQX}


DICT = "layers/0/w layers/1/w scale steps"
EQX = ("weight", "bias")
LINEN = (
    "batch_stats/BatchNorm_0/mean batch_stats/BatchNorm_0/var params/BatchNorm_0/bias params/BatchNorm_0/scale "
    "params/Dense_0/bias params/Dense_0/kernel params/Dense_1/bias params/Dense_1/kernel"
)
NNX = (
    "again/bias again/kernel count layers/0/bias layers/0/kernel layers/1/bias layers/1/kernel "
    "norm/bias norm/mean norm/scale norm/var"
)
JAX = [
    Case("jax dict", ("jax",), jax_dict, jax_train_dict, jax_read_dict, DICT, "....", "...n"),
    Case("flax linen", ("jax", "flax"), linen_model, linen_train, linen_read, LINEN, "nnyyyyyy", "sstttttt"),
    Case("flax nnx", ("jax", "flax"), nnx_model, nnx_train, nnx_read, NNX, "yynyyyyynyn", "ttntttttsts"),
    Case(
        "equinox",
        ("jax", "equinox"),
        equinox_model,
        equinox_train,
        equinox_read,
        "layers/0/weight layers/0/bias layers/1/weight layers/1/bias",
        "....",
        "....",
    ),
]
