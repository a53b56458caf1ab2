"""How one layer of every class of torch is made and called, for the tests that load each of them."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

ao: Any = torch.ao.quantization  # whose functions have no types
Make = Callable[[], Any]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Recipe:
    """One kind of layer.

    Attributes:
        make: A new one; its values depend on torch's random state.
        inputs: What it is called with, the same each time.
        lazy: A batch gives it its variables.
        grows: Buffers have another shape once it has seen a batch; a new one is loaded without having seen one.
        constant: Its variables are the same in all layers.
    """

    make: Make
    inputs: Callable[[], Inputs]
    lazy: bool = False
    grows: bool = False
    constant: bool = False


def floats(*shape: int) -> Callable[[], Inputs]:
    """Random inputs of a shape, the same each time."""
    return lambda: (torch.randn(*shape, generator=torch.Generator().manual_seed(5)),)


def twice(*shape: int) -> Callable[[], Inputs]:
    return lambda: floats(*shape)() * 2


def numbers(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(5)),)


def with_classes(*shape: int) -> Callable[[], Inputs]:
    return lambda: (*floats(*shape)(), torch.arange(shape[0]) % shape[1])


def probabilities(*shape: int) -> Callable[[], Inputs]:
    return lambda: (floats(*shape)()[0].sigmoid(), torch.ones(shape))


def noise(size: int) -> torch.Tensor:
    return torch.rand(size) + 0.5


class Holder(nn.Module):
    """Calls a container's parts."""

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: Any = self.parts.values() if hasattr(self.parts, "values") else self.parts
        for part in parts:
            x = part(x) if isinstance(part, nn.Module) else x * part
        return x


def of_container(make: Make) -> Recipe:
    return Recipe(lambda: Holder(make()), floats(2, 3))


def of_kind(name: str, *sizes: int, **options: Any) -> Make:
    return lambda: getattr(nn, name)(*sizes, **options)


def convolutions() -> Iterator[tuple[str, Recipe]]:
    for n in (1, 2, 3):
        image = floats(2, 3, *[5] * n)
        tracking = {"affine": True, "track_running_stats": True}
        yield f"Conv{n}d", Recipe(of_kind(f"Conv{n}d", 3, 2, 3, padding=1), image)
        yield f"ConvTranspose{n}d", Recipe(of_kind(f"ConvTranspose{n}d", 3, 2, 3), image)
        yield f"BatchNorm{n}d", Recipe(of_kind(f"BatchNorm{n}d", 3), image)
        yield f"InstanceNorm{n}d", Recipe(of_kind(f"InstanceNorm{n}d", 3, **tracking), image)
        yield f"LazyConv{n}d", Recipe(of_kind(f"LazyConv{n}d", 2, 3), image, lazy=True)
        yield f"LazyConvTranspose{n}d", Recipe(of_kind(f"LazyConvTranspose{n}d", 2, 3), image, lazy=True)
        yield f"LazyBatchNorm{n}d", Recipe(of_kind(f"LazyBatchNorm{n}d"), image, lazy=True)
        yield f"LazyInstanceNorm{n}d", Recipe(of_kind(f"LazyInstanceNorm{n}d", **tracking), image, lazy=True)


def transformer(make: Make, *, memory: bool) -> Recipe:
    return Recipe(make, twice(2, 3, 4) if memory else floats(2, 3, 4))


OF_NN: dict[str, Recipe] = {
    **dict(convolutions()),
    "SyncBatchNorm": Recipe(lambda: nn.SyncBatchNorm(3), floats(4, 3, 2)),  # trained on GPUs alone
    "GroupNorm": Recipe(lambda: nn.GroupNorm(2, 4), floats(2, 4, 3)),
    "LayerNorm": Recipe(lambda: nn.LayerNorm(4), floats(2, 4)),
    "RMSNorm": Recipe(lambda: nn.RMSNorm(4), floats(2, 4)),
    "Linear": Recipe(lambda: nn.Linear(4, 3), floats(2, 4)),
    "LazyLinear": Recipe(lambda: nn.LazyLinear(3), floats(2, 4), lazy=True),
    "Bilinear": Recipe(lambda: nn.Bilinear(3, 3, 2), twice(2, 3)),
    "PReLU": Recipe(lambda: nn.PReLU(3), floats(2, 3)),
    "Embedding": Recipe(lambda: nn.Embedding(5, 3, padding_idx=0), numbers(2, 3)),
    "EmbeddingBag": Recipe(lambda: nn.EmbeddingBag(5, 3), numbers(2, 3)),
    "RNN": Recipe(lambda: nn.RNN(4, 3, 2, bidirectional=True), floats(5, 2, 4)),
    "GRU": Recipe(lambda: nn.GRU(4, 3, 2, batch_first=True), floats(2, 5, 4)),
    "LSTM": Recipe(lambda: nn.LSTM(4, 3, 2, proj_size=2), floats(5, 2, 4)),
    "RNNCell": Recipe(lambda: nn.RNNCell(4, 3), floats(2, 4)),
    "GRUCell": Recipe(lambda: nn.GRUCell(4, 3), floats(2, 4)),
    "LSTMCell": Recipe(lambda: nn.LSTMCell(4, 3), floats(2, 4)),
    "MultiheadAttention": Recipe(lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), lambda: floats(3, 2, 4)() * 3),
    "Transformer": transformer(lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True), memory=True),
    "TransformerDecoder": transformer(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 2), memory=True
    ),
    "TransformerDecoderLayer": transformer(lambda: nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), memory=True),
    "TransformerEncoder": transformer(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), memory=False
    ),
    "TransformerEncoderLayer": transformer(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), memory=False),
    "AdaptiveLogSoftmaxWithLoss": Recipe(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 10, [3, 6]), lambda: (*floats(3, 16)(), torch.tensor([1, 4, 9]))
    ),
    "LinearCrossEntropyLoss": Recipe(lambda: nn.LinearCrossEntropyLoss(4, 3), with_classes(2, 4)),
    "CrossEntropyLoss": Recipe(lambda: nn.CrossEntropyLoss(noise(3)), with_classes(4, 3)),
    "NLLLoss": Recipe(lambda: nn.NLLLoss(noise(3)), with_classes(4, 3)),
    "NLLLoss2d": Recipe(
        lambda: nn.NLLLoss2d(noise(3)), lambda: (*floats(2, 3, 1, 1)(), torch.tensor([0, 2]).reshape(2, 1, 1))
    ),
    "MultiMarginLoss": Recipe(lambda: nn.MultiMarginLoss(weight=noise(3)), with_classes(4, 3)),
    "MultiLabelSoftMarginLoss": Recipe(lambda: nn.MultiLabelSoftMarginLoss(noise(3)), probabilities(2, 3)),
    "BCELoss": Recipe(lambda: nn.BCELoss(noise(3)), probabilities(2, 3)),
    "BCEWithLogitsLoss": Recipe(lambda: nn.BCEWithLogitsLoss(noise(3), pos_weight=noise(3)), probabilities(2, 3)),
    "FractionalMaxPool2d": Recipe(
        lambda: nn.FractionalMaxPool2d(2, 3, _random_samples=torch.rand(2, 3, 2)), floats(2, 3, 13, 13)
    ),
    "FractionalMaxPool3d": Recipe(
        lambda: nn.FractionalMaxPool3d(2, 3, _random_samples=torch.rand(2, 3, 3)), floats(2, 3, 13, 13, 13)
    ),
    "ModuleList": of_container(lambda: nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)])),
    "ModuleDict": of_container(lambda: nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2)})),
    "ParameterList": of_container(lambda: nn.ParameterList([torch.randn(3), torch.randn(3)])),
    "ParameterDict": of_container(lambda: nn.ParameterDict({"a": torch.randn(3), "b": torch.randn(3)})),
    "Sequential": Recipe(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), floats(4, 3)),
    "DataParallel": Recipe(lambda: nn.DataParallel(nn.Linear(3, 2)), floats(4, 3)),
}
"""By class of `torch.nn`."""

NO_LAYERS = {"Module", "Container", "RNNBase", "RNNCellBase"}
"""Classes of `torch.nn` that others inherit, and that cannot be called."""


class Orthogonal(nn.Linear):
    def __init__(self, **options: Any) -> None:
        super().__init__(3, 3)
        parametrizations.orthogonal(self, **options)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu()


def chained() -> Any:
    layer = nn.Linear(3, 3)
    for part in (Symmetric(), Doubled()):
        parametrize.register_parametrization(layer, "weight", part, unsafe=True)
    return layer


def old_weight_norm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and in use
        return nn.utils.weight_norm(nn.Linear(4, 3))


def removed() -> Any:
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    return parametrize.remove_parametrizations(layer, "weight")


def pruned() -> Any:
    from torch.nn.utils import prune

    random: Any = prune.random_unstructured  # which has no types
    return random(nn.Linear(4, 3), "weight", amount=0.5)


PARAMETRIZED: dict[str, Recipe] = {
    "weight_norm": Recipe(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), floats(2, 4)),
    "weight_norm of an LSTM": Recipe(
        lambda: parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"), floats(5, 2, 4)
    ),
    "weight_norm (old)": Recipe(old_weight_norm, floats(2, 4)),
    "spectral_norm": Recipe(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), floats(2, 4)),
    "spectral_norm of a convolution": Recipe(
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(3, 2, 3)), floats(2, 3, 5, 5)
    ),
    "spectral_norm (old)": Recipe(lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), floats(2, 4)),
    "orthogonal": Recipe(Orthogonal, floats(2, 3)),
    "orthogonal, Householder": Recipe(lambda: Orthogonal(orthogonal_map="householder"), floats(2, 3)),
    "orthogonal, Cayley": Recipe(lambda: Orthogonal(orthogonal_map="cayley"), floats(2, 3)),
    "orthogonal, without a base": Recipe(
        lambda: Orthogonal(orthogonal_map="cayley", use_trivialization=False), floats(2, 3)
    ),
    "two in a row": Recipe(chained, floats(2, 3)),
    "removed": Recipe(removed, floats(2, 4)),
    "pruned": Recipe(pruned, floats(2, 4)),
}
"""Ways to compute a weight from others."""


def quantized_linear(config: Any) -> Any:
    return torch.ao.nn.qat.Linear(4, 3, qconfig=config)


def prepared() -> Any:
    model: Any = nn.Sequential(ao.QuantStub(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), ao.DeQuantStub())
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    model.train()
    fused = ao.fuse_modules_qat(model, [["1", "2", "3"]])
    return ao.prepare_qat(fused)


def per_channel() -> Any:
    return ao.FakeQuantize.with_args(
        observer=ao.MovingAveragePerChannelMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )()  # fmt: skip


OF_QUANTIZATION: dict[str, Recipe] = {
    "FakeQuantize": Recipe(ao.FakeQuantize, floats(3, 4)),
    "FakeQuantize by channel": Recipe(per_channel, floats(3, 4), grows=True),
    "FixedQParamsFakeQuantize": Recipe(
        lambda: ao.default_fixed_qparams_range_0to1_fake_quant(), floats(3, 4), constant=True
    ),
    "FusedMovingAvgObsFakeQuantize": Recipe(ao.FusedMovingAvgObsFakeQuantize, floats(3, 4)),
    "FusedMovingAvgObsFakeQuantize by channel": Recipe(
        lambda: ao.default_fused_per_channel_wt_fake_quant(), floats(3, 4), grows=True
    ),
    "HistogramObserver": Recipe(ao.HistogramObserver, floats(3, 4)),
    "MinMaxObserver": Recipe(ao.MinMaxObserver, floats(3, 4)),
    "MovingAverageMinMaxObserver": Recipe(ao.MovingAverageMinMaxObserver, floats(3, 4)),
    "PerChannelMinMaxObserver": Recipe(ao.PerChannelMinMaxObserver, floats(3, 4), grows=True),
    "MovingAveragePerChannelMinMaxObserver": Recipe(ao.MovingAveragePerChannelMinMaxObserver, floats(3, 4), grows=True),
    "FixedQParamsObserver": Recipe(lambda: ao.FixedQParamsObserver(0.5, 3), floats(3, 4), constant=True),
    "QuantWrapper": Recipe(lambda: ao.QuantWrapper(nn.Linear(4, 3)), floats(2, 4)),
    "a linear layer": Recipe(lambda: quantized_linear(ao.get_default_qat_qconfig("fbgemm")), floats(2, 4), grows=True),
    "a model prepared by layer": Recipe(prepared, floats(2, 3, 5, 5), grows=True),
}
"""What trains with quantization in mind, by class of `torch.ao.quantization` or in words."""

NO_QUANTIZERS = {
    "AffineQuantizedObserverBase", "FakeQuantizeBase", "ObserverBase", "UniformQuantizationObserverBase",
    "_DerivedObserverOrFakeQuantize",
}  # fmt: skip
"""Classes of `torch.ao.quantization` that others inherit, and that cannot be called."""


def classes_of(module: Any) -> dict[str, type[nn.Module]]:
    """The classes of modules that one of torch's modules offers."""
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return {name: kind for name, kind in sorted(found.items()) if issubclass(kind, nn.Module)}


def may_have_variables(kind: type[nn.Module]) -> bool:
    """Whether the text of a class makes parameters, buffers, modules or state of another kind."""
    words = ("Parameter(", "register_buffer(", "register_parameter(", "_extra_state(", "Module(", "ModuleList(")
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    texts = [inspect.getsource(one) for one in own if issubclass(one, nn.Module)]
    return any(word in text for text in texts for word in words)


def trained(recipe: Recipe, seed: int) -> Any:
    """One whose every value is its own: it has seen batches, and every floating-point parameter has moved."""
    layer = made(recipe, seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    layer.train()
    if not isinstance(layer, nn.SyncBatchNorm):
        for scale in (1.0, 2.0 + seed):
            inputs = recipe.inputs()
            is_scaled = len(inputs) == 1 and inputs[0].is_floating_point()
            called(layer, [scale * inputs[0]] if is_scaled else inputs)
    return layer


def made(recipe: Recipe, seed: int) -> Any:
    """A new one, with its variables."""
    torch.manual_seed(seed)
    layer = recipe.make()
    if recipe.lazy:
        called(layer, recipe.inputs())
    return layer


def called(layer: Any, inputs: Any) -> list[torch.Tensor]:
    """What a layer makes of its inputs, as flat tensors; random parts of it are the same each time."""
    torch.manual_seed(9)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "must run observer before")  # as one that has seen nothing is asked
        found = layer(*copy.deepcopy(inputs))
        if isinstance(layer, ao.ObserverBase):  # which gives back what it was called with
            found = layer.calculate_qparams()
    return list(flat(found))


def flat(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from flat(part)
