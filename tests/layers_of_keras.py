"""How one layer of every class of Keras is made and called, for the tests that load each of them."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from fed_learn.weights import Array

WORDS = ["a", "b", "c", "d"]


@dataclass(frozen=True)
class Recipe:
    """One kind of layer.

    Attributes:
        make: A new one.
        inputs: What it is called with, one after the other.
        adapt: What is done with it before it is used, for a seed; None: nothing.
        left: What its weights leave out, in the words of the warning; empty: nothing.
        listed: Whether it takes its inputs as one list.
    """

    make: Callable[[], Any]
    inputs: tuple[Array, ...]
    adapt: Callable[[Any, int], object] | None = None
    left: str = ""
    listed: bool = False


def floats(*shape: int) -> tuple[Array, ...]:
    return (np.random.default_rng(7).standard_normal(shape).astype(np.float32),)


def numbers(*shape: int) -> tuple[Array, ...]:
    return (np.random.default_rng(7).integers(0, 5, shape).astype(np.int32),)


def words(*shape: int) -> tuple[Array, ...]:
    return (np.random.default_rng(7).choice(WORDS, shape),)


def lora(layer: Any, seed: int) -> None:
    layer.enable_lora(2)


def of_images() -> Iterator[tuple[str, Recipe]]:
    for n in (1, 2, 3):
        image = floats(2, *[5] * n, 3)
        kinds = [f"Conv{n}D", f"Conv{n}DTranspose", *([f"DepthwiseConv{n}D", f"SeparableConv{n}D"] if n < 3 else [])]
        for kind in kinds:
            sizes = (3,) if kind.startswith("Depthwise") else (2, 3)
            yield kind, Recipe(lambda kind=kind, sizes=sizes: getattr(keras.layers, kind)(*sizes), image)  # type: ignore[misc]
        sequence = floats(2, 3, *[5] * n, 2)
        yield f"ConvLSTM{n}D", Recipe(lambda n=n: getattr(keras.layers, f"ConvLSTM{n}D")(2, 3), sequence)  # type: ignore[misc]
        name = f"Conv{n}D with LoRA"
        yield name, Recipe(lambda n=n: getattr(keras.layers, f"Conv{n}D")(2, 3), image, adapt=lora)  # type: ignore[misc]


L = keras.layers
SEQUENCE = floats(2, 4, 3)
LOOKUP = "the vocabulary of StringLookup"

RECIPES: dict[str, Recipe] = {
    **dict(of_images()),
    "Dense": Recipe(lambda: L.Dense(3), floats(2, 4)),
    "Dense with LoRA": Recipe(lambda: L.Dense(3), floats(2, 4), adapt=lora),
    "EinsumDense": Recipe(lambda: L.EinsumDense("ab,bc->ac", 3, bias_axes="c"), floats(2, 4)),
    "EinsumDense with LoRA": Recipe(lambda: L.EinsumDense("ab,bc->ac", 3), floats(2, 4), adapt=lora),
    "Embedding": Recipe(lambda: L.Embedding(5, 3), numbers(2, 3)),
    "Embedding with LoRA": Recipe(lambda: L.Embedding(5, 3), numbers(2, 3), adapt=lora),
    "ReversibleEmbedding": Recipe(lambda: L.ReversibleEmbedding(5, 3), numbers(2, 3)),
    "PReLU": Recipe(L.PReLU, floats(2, 3)),
    "BatchNormalization": Recipe(L.BatchNormalization, floats(4, 3)),
    "BatchNormalization, renormalized": Recipe(lambda: L.BatchNormalization(renorm=True), floats(4, 3)),
    "GroupNormalization": Recipe(lambda: L.GroupNormalization(2), floats(2, 3, 4)),
    "LayerNormalization": Recipe(L.LayerNormalization, floats(2, 4)),
    "RMSNormalization": Recipe(L.RMSNormalization, floats(2, 4)),
    "SpectralNormalization": Recipe(lambda: L.SpectralNormalization(L.Dense(3)), floats(2, 4)),
    "Normalization": Recipe(
        L.Normalization, floats(5, 3), adapt=lambda layer, seed: layer.adapt(floats(6, 3)[0] * seed + seed)
    ),
    "Normalization, inverted": Recipe(
        lambda: L.Normalization(axis=None, invert=True), floats(5, 3),
        adapt=lambda layer, seed: layer.adapt(floats(6, 3)[0] * seed + seed),
    ),
    "Pipeline": Recipe(
        lambda: L.Pipeline([L.Normalization(), L.Rescaling(2.0)]), floats(5, 3),
        adapt=lambda layer, seed: layer.layers[0].adapt(floats(6, 3)[0] * seed + seed),
    ),
    "LSTM": Recipe(lambda: L.LSTM(3), SEQUENCE),
    "LSTM with its states": Recipe(lambda: L.LSTM(3, stateful=True), SEQUENCE),
    "GRU": Recipe(lambda: L.GRU(3), SEQUENCE),
    "SimpleRNN": Recipe(lambda: L.SimpleRNN(3), SEQUENCE),
    "RNN": Recipe(lambda: L.RNN([L.GRUCell(3), L.LSTMCell(2)]), SEQUENCE),
    "LSTMCell": Recipe(lambda: L.RNN(L.LSTMCell(3)), SEQUENCE),
    "GRUCell": Recipe(lambda: L.RNN(L.GRUCell(3)), SEQUENCE),
    "SimpleRNNCell": Recipe(lambda: L.RNN(L.SimpleRNNCell(3)), SEQUENCE),
    "StackedRNNCells": Recipe(lambda: L.RNN(L.StackedRNNCells([L.GRUCell(3), L.GRUCell(2)])), SEQUENCE),
    "Bidirectional": Recipe(lambda: L.Bidirectional(L.LSTM(3)), SEQUENCE),
    "TimeDistributed": Recipe(lambda: L.TimeDistributed(L.Dense(2)), SEQUENCE),
    "Attention": Recipe(lambda: L.Attention(use_scale=True), floats(2, 4, 3) * 2, listed=True),
    "AdditiveAttention": Recipe(L.AdditiveAttention, floats(2, 4, 3) * 2, listed=True),
    "MultiHeadAttention": Recipe(lambda: L.MultiHeadAttention(2, 3), floats(2, 4, 3) * 2),
    "GroupQueryAttention": Recipe(lambda: L.GroupQueryAttention(3, 4, 2), floats(2, 4, 3) * 2),
    "STFTSpectrogram": Recipe(
        lambda: L.STFTSpectrogram(frame_length=16, frame_step=8, fft_length=16), floats(2, 64, 1)
    ),
    "Discretization": Recipe(
        lambda: L.Discretization(num_bins=3), floats(5, 1), left="the boundaries of Discretization",
        adapt=lambda layer, seed: layer.adapt(floats(9, 1)[0] * 3 ** (seed - 2)),
    ),
    "StringLookup": Recipe(
        lambda: L.StringLookup(max_tokens=9), words(5, 1), left=LOOKUP,
        adapt=lambda layer, seed: layer.adapt(np.array(WORDS[: seed + 1])),
    ),
    "IntegerLookup": Recipe(
        lambda: L.IntegerLookup(max_tokens=9), numbers(5, 1), left="the vocabulary of IntegerLookup",
        adapt=lambda layer, seed: layer.adapt(np.arange(seed + 3)),
    ),
    "TextVectorization": Recipe(
        lambda: L.TextVectorization(9, output_mode="tf_idf"), words(5, 1), left=LOOKUP,
        adapt=lambda layer, seed: layer.adapt(np.array(WORDS[: seed + 1])),
    ),
}  # fmt: skip
"""By class of `keras.layers`, and more in words."""

CONSTANT = {"STFTSpectrogram"}
"""Those whose variables follow from their configuration."""
ELSEWHERE = {"FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"}
"""Those that belong to one back end, and have tests of their own."""
NO_LAYERS = {"Layer", "Wrapper"}
"""Classes that others inherit."""


def classes() -> dict[str, Any]:
    """The classes of `keras.layers`, each by the first of its names."""
    found: dict[Any, str] = {}
    held: dict[str, Any] = dict(vars(L))
    for name, kind in sorted(held.items()):
        if inspect.isclass(kind) and issubclass(kind, keras.Layer):
            own = kind.__name__
            found.setdefault(kind, own if held.get(own) is kind else name)
    return {name: kind for kind, name in found.items()}


def may_have_state(kind: Any) -> bool:
    """Whether the text of a class makes variables, or keeps state beside them; random seeds are left out."""
    told = ("add_weight(", "Variable(", "_own_variables", "_assets", "finalize_state", "_track_variable")
    own = kind.__mro__[: kind.__mro__.index(keras.Layer)]
    texts = [inspect.getsource(one) for one in own if one.__module__.startswith("keras.")]
    return any(word in text for text in texts for word in told)


def made(recipe: Recipe, seed: int) -> Any:
    """A model of one such layer, whose every value depends on the seed."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    layer = recipe.make()
    if recipe.adapt is not None and recipe.adapt is not lora:
        recipe.adapt(layer, seed)
    inputs = [
        keras.Input(batch_shape=value.shape, dtype="string" if value.dtype.kind == "U" else value.dtype.name)
        for value in recipe.inputs
    ]
    model = keras.Model(inputs, layer(inputs) if recipe.listed else layer(*inputs), name="net")
    if recipe.adapt is lora:
        lora(layer, seed)
    random = np.random.default_rng(seed)
    for variable in model.weights if "finalize_state" not in dir(layer) and "layers" not in dir(layer) else ():
        value = np.asarray(keras.ops.convert_to_numpy(variable.value))
        if value.dtype.kind == "f":  # variances among them, which are positive
            variable.assign(value + random.uniform(0.1, 0.3, value.shape).astype(value.dtype))
    return model


def called(model: Any, recipe: Recipe, *, training: bool) -> list[Array]:
    """What a model makes of its inputs."""
    import tensorflow as tf

    inputs = [tf.constant(one) if one.dtype.kind == "U" else keras.ops.convert_to_tensor(one) for one in recipe.inputs]
    found = model(inputs, training=training)
    return [np.asarray(keras.ops.convert_to_numpy(one)) for one in keras.tree.flatten(found)]
