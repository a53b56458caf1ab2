"""Models of the size that is really trained: what they count, and that they come back to the bit."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from models_of_frameworks import resnet50_shapes

import fed_learn as fl
from fed_learn import adapters

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


@pytest.fixture(autouse=True)
def _one_large_model_at_a_time() -> Iterator[None]:
    yield
    gc.collect()


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> Any:
    from torch import nn

    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def bottleneck(inputs: int, planes: int, stride: int) -> Any:
    from torch import nn

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(inputs, planes, 1), nn.BatchNorm2d(planes)
            self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
            self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
            self.downsample = None
            if stride > 1 or inputs != 4 * planes:
                self.downsample = nn.Sequential(conv(inputs, 4 * planes, 1, stride), nn.BatchNorm2d(4 * planes))

        def forward(self, x: Any) -> Any:
            y = self.bn1(self.conv1(x)).relu()
            y = self.bn2(self.conv2(y)).relu()
            return (self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))).relu()

    return Bottleneck()


def resnet50() -> Any:
    """ResNet-50 (He et al. 2016, v1.5) of plain layers, with the names that torchvision gives them."""
    from torch import nn

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
            width = 64
            for number, (planes, blocks) in enumerate(STAGES, 1):
                made = []
                for block in range(blocks):
                    made.append(bottleneck(width, planes, 2 if number > 1 and block == 0 else 1))
                    width = 4 * planes
                setattr(self, f"layer{number}", nn.Sequential(*made))
            self.fc = nn.Linear(width, 1000)

        def forward(self, x: Any) -> Any:
            x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
            for number in range(1, 5):
                x = getattr(self, f"layer{number}")(x)
            return self.fc(x.mean((2, 3)))

    return ResNet()


def transformer() -> Any:
    """The encoder blocks of BERT-base."""
    from torch import nn

    return nn.Sequential(*(nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True) for _ in range(12)))


def keras_application(name: str) -> Any:
    import keras

    keras.utils.clear_session()
    return getattr(keras.applications, name)(weights=None)


def equal(model: Any, weights: Any) -> bool:
    """Whether a model has these bits, read as views, so that no third copy is needed."""
    views = fl.get_weights(model, copy=False)
    return list(views) == list(weights) and all(
        views[name].dtype == array.dtype and views[name].tobytes() == array.tobytes() for name, array in weights.items()
    )


@pytest.mark.parametrize(
    ("needs", "make", "parameters", "buffers", "numbers", "first", "last"),
    [
        ("torch", resnet50, (161, 25_557_032), (159, 53_173), 25_610_205, "conv1.weight", "fc.bias"),
        ("torch", transformer, (144, 85_054_464), (0, 0), 85_054_464, "0.self_attn.in_proj_weight", "11.norm2.bias"),
        (
            "keras",
            lambda: keras_application("ResNet50"),
            (214, 25_583_592),
            (106, 53_120),
            25_636_712,
            "conv1_conv/kernel",
            "predictions/bias",
        ),
        (
            "keras",
            lambda: keras_application("MobileNetV2"),
            (158, 3_504_872),
            (104, 34_112),
            3_538_984,
            "Conv1/kernel",
            "predictions/bias",
        ),
    ],
    ids=["torch ResNet-50", "torch transformer", "keras ResNet50", "keras MobileNetV2"],
)
def test_real_models_count_what_they_should_and_come_back_to_the_bit(
    needs: str,
    make: Callable[[], Any],
    parameters: tuple[int, int],
    buffers: tuple[int, int],
    numbers: int,
    first: str,
    last: str,
) -> None:
    pytest.importorskip(needs)
    model = make()
    found = adapters.variables(model)
    for trained, (tensors, elements) in ((True, parameters), (False, buffers)):
        chosen = [v for v in found if (v.role == "trained") is trained]
        assert (len(chosen), sum(int(np.prod(v.shape)) for v in chosen)) == (tensors, elements)
        assert {v.role for v in chosen} <= ({"trained"} if trained else {"statistic", "counter"})
        assert all(v.trainable is trained for v in chosen)
    weights = fl.get_weights(model)
    assert len(weights) == parameters[0] + buffers[0]
    assert sum(array.size for array in weights.values()) == numbers
    assert (next(iter(weights)), list(weights)[-1]) == (first, last)
    assert equal(model, weights)

    rng = np.random.default_rng(0)
    for array in weights.values():
        array[...] = rng.integers(-100, 100, array.shape)
    assert not equal(model, weights)
    assert fl.set_weights(model, weights) is model
    assert equal(model, weights)

    wrong = {n: np.zeros_like(a) for n, a in weights.items()}
    wrong[last] = np.zeros((*weights[last].shape, 1), weights[last].dtype)
    with pytest.raises(fl.ShapeError, match=last):
        fl.set_weights(model, wrong)
    assert equal(model, weights)


def test_the_resnet_has_the_names_of_torchvision_and_works() -> None:
    torch = pytest.importorskip("torch")
    model = resnet50()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    names = list(fl.get_weights(model, copy=False))
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert names[:6] == ["conv1.weight", *(f"bn1.{name}" for name in norm)]
    assert "layer1.0.downsample.0.weight" in names
    assert "layer4.2.bn3.num_batches_tracked" in names
    assert len(names) == 320


def test_the_shapes_of_resnet_50_are_those_of_the_network() -> None:
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        state = resnet50().state_dict()
    shapes = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state.items()}
    assert {name: (shape, f"torch.{dtype}") for name, (shape, dtype) in resnet50_shapes().items()} == shapes
    assert list(shapes) == list(resnet50_shapes())
    assert len(shapes) == 320
