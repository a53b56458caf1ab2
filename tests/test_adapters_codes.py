"""Codes as real modules hold them: told apart by name, read, and never written as if they were numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fed_learn as fl
from fed_learn import adapters
from fed_learn.policies import codes_in
from fed_learn.weights import Schema

# Of layers that have nothing to be quantized; of torch and bitsandbytes, as they are used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras"),
]


def bits(weights: Any) -> Any:
    return {n: (str(a.dtype), a.shape, np.ascontiguousarray(a).tobytes()) for n, a in weights.items()}


def codes(model: Any) -> set[str]:
    return {variable.name for variable in fl.describe(model) if variable.role == "code"}


NESTED = {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}
BITSANDBYTES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("Linear4bit", {"quant_type": "nf4"}, {*NESTED, "quant_state.bitsandbytes__nf4"}),
    ("Linear4bit", {"quant_type": "fp4"}, {*NESTED, "quant_state.bitsandbytes__fp4"}),
    (
        "Linear4bit",
        {"quant_type": "nf4", "compress_statistics": False},
        {"absmax", "quant_map", "quant_state.bitsandbytes__nf4"},
    ),
    ("Linear8bitLt", {"has_fp16_weights": False}, set()),
]


def quantized(kind: str, arguments: dict[str, Any], seed: int) -> Any:
    layers = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(seed)
    model = nn.Module()
    model.base = getattr(layers, kind)(64, 64, bias=False, **arguments)
    model.lora_A = nn.Linear(64, 4, bias=False)
    return model.to("cpu")


@pytest.mark.parametrize(("kind", "arguments", "parts"), BITSANDBYTES)
def test_the_codes_of_bitsandbytes_are_read_and_loaded_only_where_they_are_the_same(
    kind: str, arguments: dict[str, Any], parts: set[str]
) -> None:
    model, other = (quantized(kind, arguments, seed) for seed in (0, 1))
    expected = {"base.weight", *(f"base.weight.{part}" for part in parts)}
    if kind == "Linear8bitLt":
        expected |= {"base.SCB", "base.weight_format"}
    assert codes(model) == codes(model.state_dict()) == expected
    weights = fl.get_weights(model)
    assert codes(weights) == expected
    assert weights.keys() == expected | {"lora_A.weight"}
    assert set(fl.describe(model).policies.values()) == {"same"}

    before = bits(fl.get_weights(other))
    with pytest.raises(fl.NotSameError, match=r"'base\.weight' differs from the model's own.*only="):
        fl.set_weights(other, weights)
    assert bits(fl.get_weights(other)) == before
    changed = weights | {"lora_A.weight": np.full((4, 64), 3, np.float32)}
    fl.set_weights(model, changed)
    assert bits(fl.get_weights(model)) == bits(changed)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_what_lies_beside_codes_is_loaded_also_after_a_forward_pass(kind: str) -> None:
    layer = getattr(pytest.importorskip("bitsandbytes").nn, kind)
    arguments = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"quant_type": "nf4"}
    model = nn.Sequential(layer(64, 64, **arguments)).to("cpu")
    x = torch.randn(4, 64)
    before = model(x)
    weights = fl.get_weights(model)
    fl.set_weights(model, weights)
    assert torch.equal(model(x), before)
    fl.set_weights(model, {"0.bias": np.full_like(weights["0.bias"], 3)}, strict=False)
    assert fl.get_weights(model)["0.bias"].tolist() == [3] * 64
    assert model(x).allclose(before - torch.from_numpy(weights["0.bias"]) + 3, atol=1e-4)


QUANTIZED: dict[str, tuple[Callable[[], Any], bool]] = {
    "convert": (lambda: converted(nn.Linear(3, 2)), True),
    "dynamic": (lambda: dynamic(nn.Linear(3, 2)), False),
    "dynamic, and another layer": (lambda: dynamic(nn.Linear(3, 2), nn.BatchNorm1d(2)), True),
}
"""Models that torch has quantized, and whether they have variables that can be averaged."""


def converted(*layers: Any) -> Any:
    ao: Any = torch.ao.quantization
    model = nn.Sequential(ao.QuantStub(), *layers, ao.DeQuantStub()).train()
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    prepared = ao.prepare_qat(model)
    prepared(torch.randn(8, 3))
    return ao.convert(prepared.eval())


def dynamic(*layers: Any) -> Any:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    return quantize(nn.Sequential(*layers), {nn.Linear, nn.LSTM})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning", "ignore:the model keeps '.*_packed_params:UserWarning")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_model_that_torch_has_quantized_is_to_be_averaged_before(kind: str) -> None:
    made, others = QUANTIZED[kind]
    model = made()
    with pytest.raises(fl.ModelError, match=r"packed.*Average the model before .*convert\(\) or quantize_") as caught:
        fl.get_weights(model)
    assert ("only= chooses the others" in str(caught.value)) == others
    state = model.state_dict()
    with pytest.raises(fl.WeightsTypeError, match=r"_packed_params.*packed.*Average.*fl\.get_weights\(state_dict\)"):
        fl.weighted_average([state, state])
    tensors = {name for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert fl.weighted_average([fl.get_weights(state)] * 2).keys() == tensors


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_packed_weights_without_a_length_are_named_by_the_warning() -> None:
    with pytest.warns(UserWarning, match=r"keeps '0\._all_weight_values\.0\.param' \(a ScriptObject"):
        assert list(fl.get_weights(dynamic(nn.LSTM(3, 2), nn.BatchNorm1d(2))))[:2] == ["1.weight", "1.bias"]


@pytest.mark.parametrize(("kind", "arguments", "parts"), BITSANDBYTES)
def test_adapters_of_low_rank_beside_codes_are_read_averaged_and_loaded_alone(
    kind: str, arguments: dict[str, Any], parts: set[str]
) -> None:
    pair = [quantized(kind, arguments, seed) for seed in (0, 1)]
    base = [bits(fl.get_weights(model, only="base")) for model in pair]
    mean = fl.weighted_average([fl.get_weights(model, only="lora_") for model in pair])
    assert list(mean) == ["lora_A.weight"]
    for model in pair:
        fl.set_weights(model, mean, only="lora_")
        assert bits(fl.get_weights(model, only="lora_")) == bits(mean)
    assert [bits(fl.get_weights(model, only="base")) for model in pair] == base


def test_random_states_that_are_buffers_are_codes_and_loaded_as_they_are() -> None:
    def model(seed: int) -> Any:
        net = nn.Linear(1, 1)
        torch.manual_seed(seed)
        net.register_buffer("rng_state", torch.get_rng_state())
        return net

    source, target = model(1), model(2)
    assert codes(source) == {"rng_state"}
    fl.set_weights(target, fl.get_weights(source))
    assert torch.equal(target.rng_state, source.rng_state)


def quantized_tensor() -> Any:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (quantized_tensor, "qint8"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.ones(2).to(torch.float8_e5m2), "float8_e5m2"),
    ],
)
def test_dtypes_of_codes_are_refused_by_name_with_what_to_do(make: Callable[[], Any], dtype: str) -> None:
    model: Any = nn.Linear(1, 1)
    model.register_buffer("packed", make())
    said = rf"'packed' has dtype torch\.{dtype}, which cannot be averaged; only= chooses the others"
    for use in (fl.get_weights, lambda one: fl.set_weights(one, {}), lambda one: fl.get_weights(one.state_dict())):
        with pytest.raises(fl.DtypeError, match=said):
            use(model)
    assert list(fl.get_weights(model, only="weight|bias")) == ["weight", "bias"]


def test_integers_are_never_trained_whatever_holds_them() -> None:
    model: Any = nn.Module()
    model.qweight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), requires_grad=False)
    model.scales = nn.Parameter(torch.ones(2))
    assert {v.name: v.role for v in adapters.variables(model)} == {"qweight": "code", "scales": "code"}
    del model.scales
    assert {v.name: v.role for v in adapters.variables(model)} == {"qweight": "constant"}


def schema(**forms: tuple[str, tuple[int, ...]]) -> Schema:
    return Schema(
        (name.replace("___", "._").replace("__", "."), (shape, np.dtype(dtype)))
        for name, (dtype, shape) in forms.items()
    )


def test_packed_weights_are_known_by_what_lies_beside_them() -> None:
    gptq = schema(
        a__qweight=("int32", (2, 2)),
        a__qzeros=("int32", (1, 2)),
        a__scales=("float16", (1, 2)),
        a__g_idx=("int32", (2,)),
    )
    with_bias = Schema({**gptq, "a.bias": ((2,), np.dtype("float16"))})
    assert codes_in(with_bias) == dict.fromkeys(gptq, "packed codes of GPTQ or AWQ")
    blocks = schema(e_blocks=("uint8", (2, 2)), e_scales=("uint8", (2,)))
    assert set(codes_in(blocks)) == {"e_blocks", "e_scales"}
    assert codes_in(schema(a__qweight=("int32", (2, 2)), steps=("int32", ()))) == {}


QUANTIZERS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "compressed-tensors": {
        "a__weight_packed": ("int32", (2, 2)),
        "a__weight_scale": ("float16", (2, 1)),
        "a__weight_shape": ("int64", (2,)),
    },
    "compressed-tensors, 8 bits": {"a__weight": ("int8", (2, 2)), "a__weight_scale": ("float32", (2, 1))},
    "HQQ": {
        "a__W_q": ("uint8", (2, 2)),
        "a__scale": ("float16", (2, 1)),
        "a__zero": ("float16", (2, 1)),
        "a__nbits": ("int32", ()),
    },
    "optimum-quanto": {"a__weight___data": ("int8", (2, 2)), "a__weight___scale": ("float32", (2, 1))},
    "optimum-quanto, 4 bits": {
        "a__weight___data___data": ("uint8", (2, 2)),
        "a__weight___scale": ("float32", (2, 1)),
        "a__weight___shift": ("float32", (2, 1)),
    },
    "EETQ": {"a__weight": ("int8", (2, 2)), "a__weight_scales": ("float16", (2,))},
    "AQLM": {
        "a__codes": ("int16", (2, 2, 1)),
        "a__codebooks": ("float16", (1, 4, 1, 8)),
        "a__scales": ("float16", (2, 1, 1, 1)),
    },
}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_codes_of_more_quantizers_are_known_and_what_is_beside_them_is_not(kind: str) -> None:
    parts = schema(**QUANTIZERS[kind])
    beside = schema(a__bias=("float16", (2,)), b__weight=("float16", (2, 2)), b__scale=("float16", (1,)))
    text = f"codes of {kind.partition(',')[0]}"
    assert codes_in(Schema({**parts, **beside})) == dict.fromkeys(parts, text)

    def sent(number: int) -> dict[str, Any]:
        arrays = {name: np.full(shape, number, dtype) for name, (shape, dtype) in parts.items()}
        return {**arrays, "a.bias": np.full(2, number, np.float16)}

    with pytest.raises(fl.NotSameError, match=f"it is {text}"):
        fl.weighted_average([sent(1), sent(3)])
    assert fl.weighted_average([sent(1), {**sent(1), "a.bias": np.full(2, 3, np.float16)}])["a.bias"].tolist() == [2, 2]


def test_integers_that_only_have_a_name_of_codes_are_none() -> None:
    plain = schema(
        a__weight=("int8", (2, 2)),
        b__W_q=("int8", (2, 2)),
        b__scale=("float32", (1,)),
        c__codes=("int32", (4,)),
        c__codebooks=("float32", (2, 2)),
        d__weight=("float32", (2, 2)),
        d__weight_scale=("float32", (1,)),
    )
    assert codes_in(plain) == {}


def test_4_bit_weights_are_found_in_one_pass_over_the_names() -> None:
    class Counted(Schema):
        passes = 0

        def __iter__(self) -> Any:
            type(self).passes += 1
            return super().__iter__()

    ends = ("", ".absmax", ".quant_map", ".nested_absmax", ".quant_state.bitsandbytes__nf4")
    names = [f"{i}.weight{end}" for i in range(50) for end in ends]
    found = codes_in(Counted((name, ((8,), np.dtype(np.uint8))) for name in [*names, "0.weights", "0.bias"]))
    assert list(found) == names
    assert Counted.passes <= 4


def test_states_of_8_bit_optimizers_are_codes() -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    model = nn.Linear(64, 64)
    optimizer = optim.AdamW8bit(model.parameters())
    state = optimizer.state
    for parameter in (model.weight, model.bias):
        state[parameter] = {
            "step": 1,
            "state1": torch.zeros_like(parameter, dtype=torch.uint8),
            "qmap1": torch.zeros(256),
            "absmax1": torch.zeros(1),
        }
    assert codes(optimizer) == {f"state.{i}.{part}" for i in (0, 1) for part in ("state1", "qmap1", "absmax1")}


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_layers_of_keras_are_codes_and_the_rest_is_read_beside_them(mode: str) -> None:
    keras = pytest.importorskip("keras")
    layers = [keras.layers.Dense(4, name="d"), keras.layers.BatchNormalization(name="bn")]
    model = keras.Sequential([keras.Input((8,)), *layers], name="net")
    model.get_layer("d").enable_lora(2)
    model.quantize(mode)
    kernel = {name for name in (v.path for v in model.weights) if "/kernel" in name or "g_idx" in name}
    assert codes(model) == kernel >= {"net/d/kernel", "net/d/kernel_scale"}
    by_name = Schema((v.path, (tuple(v.shape), np.dtype(v.dtype))) for v in model.weights)
    assert set(codes_in(by_name)) == kernel
    with pytest.raises(fl.DtypeError, match=rf"'net/d/kernel' has the codes of a layer quantized to {mode}.*only="):
        fl.get_weights(model)
    part = fl.get_weights(model, only="lora_|bias|bn")
    assert {"net/d/lora_kernel_a", "net/bn/moving_mean"} < part.keys()
    fl.set_weights(model, part, only="lora_|bias|bn")


def test_scales_of_float8_layers_of_keras_are_statistics() -> None:
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="d")], name="net")
    model.quantize("float8")
    roles = {v.name.removeprefix("net/d/"): v.role for v in adapters.variables(model)}
    assert (roles.pop("kernel"), roles.pop("bias")) == ("trained", "trained")
    assert len(roles) == 6
    assert set(roles.values()) == {"statistic"}
