"""The same architectures in torch and in Keras, and what the tests of layout maps do with them."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import torch
from keras import layers
from sklearn.datasets import load_digits
from torch import nn

Weights = dict[str, Any]
EPSILON = 1e-5
"""That of torch; Keras has 1e-3 by default."""


def digits(count: int = 64) -> Any:
    """Real images, 8 × 8, from 0 to 1."""
    return (load_digits().images[:count] / 16).astype(np.float32)


def torch_weights(model: Any) -> Weights:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def keras_weights(model: Any) -> Weights:
    return {variable.path: np.asarray(variable).copy() for variable in model.weights}


def weights_of(model: Any) -> Weights:
    return keras_weights(model) if isinstance(model, keras.Layer) else torch_weights(model)


def load(model: Any, weights: Weights) -> None:
    if not isinstance(model, keras.Layer):  # which is a torch module too, on the torch back end
        model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    else:
        assert weights.keys() == {variable.path for variable in model.weights}
        for variable in model.weights:
            variable.assign(weights[variable.path])


def outputs(model: Any, data: Any) -> Any:
    if isinstance(model, keras.Layer):
        return keras.ops.convert_to_numpy(model(data, training=False))
    model.eval()
    with torch.no_grad():
        return model(torch.from_numpy(data)).numpy()


def channels_last(data: Any) -> Any:
    """Feature maps with their channels first, as Keras has them."""
    return np.ascontiguousarray(np.moveaxis(data, 1, -1))


def stirred(model: Any, seed: int = 0) -> Any:
    """The torch module with all weights and statistics random, so that no two variables are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                # Around 1 what scales, and around 0 what is added.
                middle = 1.0 if tensor.dim() == 1 and "bias" not in name and "mean" not in name else 0.0
                noise = torch.randn(tensor.shape, generator=generator) * 0.3
                tensor.copy_((middle + noise).abs() + 0.2 if name.endswith("running_var") else middle + noise)
            else:
                tensor.fill_(7)
    return model


def bits(weights: Weights) -> Any:
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in weights.items()}


class Call(nn.Module):
    """Layers, and how they are called."""

    def __init__(self, forward: Callable[[Any, Any], Any], **children: Any) -> None:
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def functional(shape: tuple[int | None, ...], function: Callable[[Any], Any], dtype: str = "float32") -> Any:
    inputs = keras.Input(shape, dtype=dtype)
    return keras.Model(inputs, function(inputs))


def sequential(shape: tuple[int, ...], *parts: Any) -> Any:
    return keras.Sequential([keras.Input(shape), *parts])


def batch_norm(**more: Any) -> Any:
    return layers.BatchNormalization(epsilon=EPSILON, **more)


def layer_norm(**more: Any) -> Any:
    return layers.LayerNormalization(epsilon=EPSILON, **more)


# A ConvNet with Flatten, BatchNorm and a depthwise convolution; images (N, 1, 8, 8).


def torch_conv_net() -> Any:
    def forward(net: Any, x: Any) -> Any:
        x = torch.relu(net.norm1(net.conv(x)))
        x = torch.relu(net.norm2(net.depthwise(x)))
        x = nn.functional.max_pool2d(torch.relu(net.pointwise(x)), 2)
        return net.classify(torch.relu(net.norm3(net.hidden(torch.flatten(x, 1)))))

    return Call(
        forward,
        conv=nn.Conv2d(1, 6, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(6),
        depthwise=nn.Conv2d(6, 12, 3, padding=1, groups=6),
        norm2=nn.BatchNorm2d(12),
        pointwise=nn.Conv2d(12, 5, 1),
        hidden=nn.Linear(5 * 4 * 4, 16),
        norm3=nn.BatchNorm1d(16),
        classify=nn.Linear(16, 10),
    )


def keras_conv_net() -> Any:
    return sequential(
        (8, 8, 1),
        layers.Conv2D(6, 3, padding="same", use_bias=False),
        batch_norm(),
        layers.ReLU(),
        layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
        batch_norm(),
        layers.ReLU(),
        layers.Conv2D(5, 1, activation="relu"),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dropout(0.3),
        layers.Dense(16),
        batch_norm(),
        layers.ReLU(),
        layers.Dense(10),
    )


class KerasConvNet(keras.Model):  # type: ignore[misc]
    """The same as a subclass, whose order of calls cannot be seen."""

    def __init__(self, flatten: bool = True) -> None:
        super().__init__()
        self.conv = layers.Conv2D(6, 3, padding="same", use_bias=False)
        self.norm1 = batch_norm()
        self.depthwise = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)
        self.norm2 = batch_norm()
        self.pointwise = layers.Conv2D(5, 1, activation="relu")
        self.pool = layers.MaxPooling2D(2)
        self.flatten = layers.Flatten() if flatten else None
        self.hidden = layers.Dense(16)
        self.norm3 = batch_norm()
        self.classify = layers.Dense(10)

    def call(self, x: Any, training: bool = False) -> Any:
        relu = keras.ops.relu
        x = relu(self.norm1(self.conv(x), training=training))
        x = self.pool(self.pointwise(relu(self.norm2(self.depthwise(x), training=training))))
        x = keras.ops.reshape(x, (-1, 5 * 4 * 4)) if self.flatten is None else self.flatten(x)
        return self.classify(relu(self.norm3(self.hidden(x), training=training)))


# Classifiers of sequences; the rows of an image are the steps, (N, 8, 8).


def torch_recurrent(kind: str = "LSTM", depth: int = 2, both: bool = False) -> Any:
    layer = getattr(nn, kind)(8, 12, num_layers=depth, batch_first=True, bidirectional=both)
    head = nn.Linear(24 if both else 12, 10)
    # The mean of all steps: the last one would differ, since Keras turns the way back around.
    return Call(lambda net, x: net.head(net.layer(x)[0].mean(1)), layer=layer, head=head)


def keras_recurrent(kind: str = "LSTM", depth: int = 2, both: bool = False) -> Any:
    def function(x: Any) -> Any:
        for _ in range(depth):
            layer = getattr(layers, "SimpleRNN" if kind == "RNN" else kind)(12, return_sequences=True)
            x = (layers.Bidirectional(layer) if both else layer)(x)
        return layers.Dense(10)(layers.GlobalAveragePooling1D()(x))

    return functional((8, 8), function)


# A transformer encoder.


def torch_transformer(norm_first: bool = False) -> Any:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.1, batch_first=True, norm_first=norm_first)
    return Call(
        lambda net, x: net.head(net.encoder(net.embed(x)).mean(1)),
        embed=nn.Linear(8, 16),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        head=nn.Linear(16, 10),
    )


def keras_transformer(norm_first: bool = False) -> Any:
    def block(x: Any) -> Any:
        attention, first, second = layers.MultiHeadAttention(4, 4, dropout=0.1), layer_norm(), layer_norm()
        inner, outer = layers.Dense(24, activation="relu"), layers.Dense(16)
        if norm_first:
            y = first(x)
            x = x + attention(y, y)
            return x + outer(inner(second(x)))
        x = first(x + attention(x, x))
        return second(x + outer(inner(x)))

    def function(x: Any) -> Any:
        x = block(block(layers.Dense(16)(x)))
        return layers.Dense(10)(layers.GlobalAveragePooling1D()(x))

    return functional((8, 8), function)


# Residual blocks whose shortcut stands in another place: (N, 1, 8, 8).


def torch_residual() -> Any:
    def forward(net: Any, x: Any) -> Any:
        x = torch.relu(net.norm0(net.conv0(x)))
        y = net.norm2(net.conv2(torch.relu(net.norm1(net.conv1(x)))))
        x = torch.relu(y + net.norm3(net.shortcut(x)))
        return net.head(x.mean((2, 3)))

    return Call(
        forward,
        conv0=nn.Conv2d(1, 4, 3, padding=1),
        norm0=nn.BatchNorm2d(4),
        conv1=nn.Conv2d(4, 8, 3, padding=1),
        norm1=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 8, 3, padding=1),
        norm2=nn.BatchNorm2d(8),
        shortcut=nn.Conv2d(4, 8, 1),
        norm3=nn.BatchNorm2d(8),
        head=nn.Linear(8, 10),
    )


def keras_residual() -> Any:
    def function(x: Any) -> Any:
        x = layers.ReLU()(batch_norm()(layers.Conv2D(4, 3, padding="same")(x)))
        shortcut = batch_norm(name="norm_s")(layers.Conv2D(8, 1, name="conv_s")(x))
        y = layers.ReLU()(batch_norm(name="norm_a")(layers.Conv2D(8, 3, padding="same", name="conv_a")(x)))
        y = batch_norm(name="norm_b")(layers.Conv2D(8, 3, padding="same", name="conv_b")(y))
        x = layers.ReLU()(layers.Add()([shortcut, y]))
        return layers.Dense(10)(layers.GlobalAveragePooling2D()(x))

    return functional((8, 8, 1), function)


# The beginning of a ResNet: strides, with the padding of torch; images (N, 3, H, W).


def torch_strided_residual() -> Any:
    def forward(net: Any, x: Any) -> Any:
        x = net.pool(torch.relu(net.bn1(net.conv1(x))))
        for block in (net.block1, net.block2):
            y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            x = torch.relu(y + block.down(x))
        return net.fc(x.mean((2, 3)))

    def block(takes: int, gives: int) -> nn.Module:
        return nn.ModuleDict(
            {
                "conv1": nn.Conv2d(takes, gives, 3, stride=2, padding=1, bias=False),
                "bn1": nn.BatchNorm2d(gives),
                "conv2": nn.Conv2d(gives, gives, 3, padding=1, bias=False),
                "bn2": nn.BatchNorm2d(gives),
                "down": nn.Sequential(nn.Conv2d(takes, gives, 1, stride=2, bias=False), nn.BatchNorm2d(gives)),
            }
        )

    return Call(
        forward,
        conv1=nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(4),
        pool=nn.MaxPool2d(3, stride=2, padding=1),
        block1=block(4, 6),
        block2=block(6, 8),
        fc=nn.Linear(8, 10),
    )


def keras_strided_residual() -> Any:
    def convolved(x: Any, gives: int, size: int, strides: int) -> Any:
        if strides > 1 and size > 1:
            x = layers.ZeroPadding2D(size // 2)(x)
        padding = "valid" if strides > 1 and size > 1 else "same"
        return batch_norm()(layers.Conv2D(gives, size, strides, padding=padding, use_bias=False)(x))

    def function(x: Any) -> Any:
        x = layers.ReLU()(convolved(x, 4, 7, 2))
        x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1, name="pool_pad")(x))
        for gives in (6, 8):
            y = convolved(layers.ReLU()(convolved(x, gives, 3, 2)), gives, 3, 1)
            x = layers.ReLU()(layers.Add()([y, convolved(x, gives, 1, 2)]))
        return layers.Dense(10)(layers.GlobalAveragePooling2D()(x))

    return functional((None, None, 3), function)
