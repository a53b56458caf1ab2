"""Averages of LoRA's products, against dense numpy; and what is refused. PEFT itself is in `test_lora_peft`."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fed_learn as fl
from fed_learn.lora.config import _finder
from fed_learn.weights import Array, rounded

pytestmark = pytest.mark.quick

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
LAYER = "base_model.model.q"


def adapter(seed: int, rank: int, sizes: tuple[int, int] = (7, 9), dtype: Any = np.float64) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    outputs, inputs = sizes
    return {A: random.normal(size=(rank, inputs)).astype(dtype), B: random.normal(size=(outputs, rank)).astype(dtype)}


def product(weights: Any, scaling: float = 1.0) -> Any:
    return scaling * (np.asarray(weights[B], np.float64) @ np.asarray(weights[A], np.float64))


def dense(adapters: list[Any], weights: list[float], scalings: list[float]) -> Any:
    total = sum(weights)
    return sum(w / total * product(one, s) for one, w, s in zip(adapters, weights, scalings, strict=True))


def truncated(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def near(found: Any, expected: Any, relative: float = 1e-6) -> bool:
    return bool(np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected))


def config(rank: int, alpha: float, **fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **fields}


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 13, 16, 32, 64])
def test_the_result_is_the_truncated_dense_decomposition_at_every_rank(rank: int) -> None:
    adapters = [adapter(seed, rank, (150, 90)) for seed in range(5)]
    weights = [1.0, 2.0, 3.0, 5.0, 0.5]
    mean = dense(adapters, weights, [1.0] * 5)
    found = fl.lora.average(adapters, weights)
    best = truncated(mean, rank)
    assert {name: array.shape for name, array in found.weights.items()} == {A: (rank, 90), B: (150, rank)}
    assert near(product(found.weights), best)
    left = np.linalg.norm(mean - best) / np.linalg.norm(mean)
    assert found.report[LAYER].error == pytest.approx(left, rel=1e-6, abs=1e-12)


@settings(deadline=None, max_examples=80)
@given(
    ranks=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    rank=st.one_of(st.none(), st.integers(1, 30)),
    rslora=st.booleans(),
    data=st.data(),
)
def test_mixed_ranks_scalings_and_weights_agree_with_the_dense_decomposition(
    ranks: list[int], sizes: tuple[int, int], rank: int | None, rslora: bool, data: st.DataObject
) -> None:
    count = len(ranks)
    alphas = data.draw(st.lists(st.integers(1, 64), min_size=count, max_size=count))
    weights = data.draw(st.lists(st.floats(0.001, 1e6), min_size=count, max_size=count))
    adapters = [adapter(seed, r, sizes) for seed, r in enumerate(ranks)]
    configs = [config(r, alpha, use_rslora=rslora) for r, alpha in zip(ranks, alphas, strict=True)]
    divisors = [np.sqrt(r) if rslora else r for r in ranks]
    scalings = [alpha / divisor for alpha, divisor in zip(alphas, divisors, strict=True)]
    mean = dense(adapters, weights, scalings)

    found = fl.lora.average(adapters, weights, config=configs, rank=rank)
    made = max(ranks) if rank is None else rank
    scaling = found.config["lora_alpha"] / (np.sqrt(made) if rslora else made)
    assert found.config["r"] == made == found.report[LAYER].rank
    assert found.report[LAYER].ranks == tuple(ranks)
    assert found.report[LAYER].scaling == pytest.approx(scaling)
    assert np.linalg.norm(product(found.weights, scaling) - truncated(mean, made)) <= 1e-6 * np.linalg.norm(mean)

    exact = fl.lora.average(adapters, weights, config=configs, method="stack")
    scaling = exact.config["lora_alpha"] / (np.sqrt(sum(ranks)) if rslora else sum(ranks))
    assert exact.config["r"] == sum(ranks)
    assert exact.report[LAYER].error == 0
    assert near(product(exact.weights, scaling), mean, 1e-12)


def test_one_adapter_keeps_its_product_and_configuration() -> None:
    one, own = adapter(1, 4), config(4, 8)
    found = fl.lora.average([one], config=own)
    assert near(product(found.weights), product(one), 1e-14)
    assert found.config == own
    assert found.base is None
    assert found.report[LAYER].error < 1e-15


def test_singular_values_are_split_evenly_and_signs_are_fixed() -> None:
    found = fl.lora.average([adapter(1, 3), adapter(2, 3)]).weights
    lengths = np.linalg.norm(found[A], axis=1), np.linalg.norm(found[B], axis=0)
    assert lengths[0] == pytest.approx(lengths[1])
    assert (np.diff(lengths[0]) < 0).all()
    assert (found[B][np.abs(found[B]).argmax(axis=0), range(3)] > 0).all()


def test_contributions_are_summed_in_the_order_of_their_names_whatever_the_order_of_arrival() -> None:
    sent = [fl.Contribution(f"site-{k}", adapter(k, 2), 1 + k) for k in range(4)]
    configs = [config(2, 1 + k) for k in range(4)]
    made = set()
    for order in itertools.permutations(range(4)):
        found = fl.lora.average([sent[k] for k in order], config=[configs[k] for k in order])
        assert found.config == configs[0]
        made.add((found.weights[A].tobytes(), found.weights[B].tobytes()))
    assert len(made) == 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_factors_are_computed_in_float64_and_rounded_once(dtype: Any) -> None:
    adapters = [adapter(k, 3, dtype=dtype) for k in range(3)]
    wide = [{name: array.astype(np.float64) for name, array in one.items()} for one in adapters]
    found, expected = fl.lora.average(adapters).weights, fl.lora.average(wide).weights
    for name in (A, B):
        assert found[name].dtype == dtype
        assert np.array_equal(found[name], rounded(expected[name], np.dtype(dtype)))


def test_other_variables_get_the_weighted_mean_and_the_order_of_the_first_stays() -> None:
    head = {"classifier.weight": np.array([[1.0, 2.0]], np.float32)}
    first = {**head, **adapter(1, 2), "steps": np.array(3)}
    second = {**adapter(2, 2), "classifier.weight": np.array([[5.0, 4.0]], np.float32), "steps": np.array(5)}
    found = fl.lora.average([first, second], [3, 1]).weights
    assert list(found) == ["classifier.weight", A, B, "steps"]
    assert found["classifier.weight"].tolist() == [[2.0, 2.5]]
    assert found["classifier.weight"].dtype == np.float32
    assert int(found["steps"]) == 4


def test_biases_of_factors_are_scaled_as_the_product_is() -> None:
    bias = "base_model.model.q.lora_B.bias"
    adapters = [{**adapter(k, 2), bias: np.full(7, float(k))} for k in (1, 2)]
    found = fl.lora.average(adapters, [1, 3], config=[config(2, 2), config(2, 8)])
    assert found.weights[bias].tolist() == [(0.25 * 1 * 1 + 0.75 * 4 * 2) / 1] * 7
    lone = {name: array for name, array in adapters[0].items() if name != bias} | {"k.lora_B.bias": np.zeros(7)}
    with pytest.raises(fl.NamesError, match=r"adapters\[0\]: 'k.lora_B.bias' is the bias of a factor that is not"):
        fl.lora.average([lone])


def test_magnitudes_of_dora_are_averaged_beside_the_exact_mean_of_directions() -> None:
    magnitude = "base_model.model.q.lora_magnitude_vector"
    adapters = [{**adapter(k, 2), magnitude: np.full(7, float(k))} for k in (1, 3)]
    assert fl.lora.average(adapters).weights[magnitude].tolist() == [2.0] * 7


def test_where_nothing_was_learned_yet_training_can_go_on() -> None:
    start = {A: np.random.default_rng(0).normal(size=(3, 9)), B: np.zeros((7, 3))}
    found = fl.lora.average([start, start])
    assert not found.weights[B].any()
    assert found.report[LAYER].error == 0
    # All of the rows of A that a gradient of B needs, as long as they were.
    assert (
        np.linalg.matrix_rank(np.vstack([found.weights[A], start[A]])) == np.linalg.matrix_rank(found.weights[A]) == 3
    )
    length = np.sqrt(np.square(start[A]).sum() / 3)
    assert np.linalg.norm(found.weights[A], axis=1) == pytest.approx([length] * 3)


def test_adapters_that_are_zero_throughout_stay_so_and_ranks_may_exceed_every_size() -> None:
    zero = {A: np.zeros((3, 9)), B: np.zeros((7, 3))}
    found = fl.lora.average([zero, zero]).weights
    assert not found[A].any()
    assert not found[B].any()
    wide = [adapter(k, 20, (2, 3)) for k in range(2)]
    found = fl.lora.average(wide).weights
    assert found[A].shape == (20, 3)
    assert near(product(found), dense(wide, [1, 1], [1, 1]), 1e-12)


def test_products_that_cancel_leave_nothing_but_rows_to_go_on_with() -> None:
    one = adapter(1, 2)
    found = fl.lora.average([one, {A: one[A], B: -one[B]}])
    assert np.abs(product(found.weights)).max() < 1e-14
    assert np.linalg.matrix_rank(found.weights[A]) == 2


def test_what_counts_by_zero_is_checked_and_adds_nothing() -> None:
    one, other = adapter(1, 2), adapter(2, 5)
    both = [config(2, 2), config(5, 5)]
    found = fl.lora.average([one, other], [1, 0], config=both)
    assert found.report[LAYER].ranks == (2,)
    assert near(product(found.weights), product(one), 1e-14)
    with pytest.raises(fl.EmptyAggregationError, match="all aggregation weights are 0"):
        fl.lora.average([one, other], [0, 0], config=both)
    other[A][3, 3] = np.nan
    with pytest.raises(fl.NonFiniteError, match=r"adapters\[1\]: .*lora_A.weight' at index \(3, 3\)"):
        fl.lora.average([one, other], [1, 0], config=both)


def test_a_client_whose_factors_are_of_other_magnitudes_loses_no_bits_to_another() -> None:
    one, other = adapter(1, 2), adapter(2, 2)
    lopsided = {A: one[A] * 2.0**-400, B: one[B] * 2.0**400}
    assert near(
        product(fl.lora.average([lopsided, other], rank=None).weights),
        product(fl.lora.average([one, other]).weights),
        1e-13,
    )


def test_aggregation_weights_of_any_size_count() -> None:
    adapters = [adapter(1, 2), adapter(2, 2)]
    expected = fl.lora.average(adapters, [1, 1]).weights
    for weight in (5e-324, 1e308):
        assert fl.lora.average(adapters, [weight, weight]).weights[A].tobytes() == expected[A].tobytes()


def test_patterns_give_layers_their_own_ranks_and_alphas() -> None:
    def of(seed: int) -> dict[str, Array]:
        sizes = {"base_model.model.layers.0.q_proj": 2, "base_model.model.layers.1.q_proj": 5, "base_model.model.k": 3}
        parts = [(layer, adapter(seed + i, rank)) for i, (layer, rank) in enumerate(sizes.items())]
        return {name.replace(LAYER, layer): array for layer, part in parts for name, array in part.items()}

    own = config(2, 4, rank_pattern={r"layers\.1\.q_proj": 5, "k": 3}, alpha_pattern={"k": 12, "q": 99})
    found = fl.lora.average([of(1), of(5)], config=own)
    assert {layer: one.scaling for layer, one in found.report.items()} == {
        "base_model.model.layers.0.q_proj": 2.0,
        "base_model.model.layers.1.q_proj": 0.8,
        "base_model.model.k": 4.0,
    }
    assert found.config == own
    stacked = fl.lora.average([of(1), of(5)], config=own, method="stack").config
    assert stacked["r"] == 4
    assert stacked["lora_alpha"] == 8
    assert stacked["rank_pattern"] == {r"^layers\.1\.q_proj": 10, "^k": 6}
    assert stacked["alpha_pattern"] == {"^k": 24}


def test_expressions_of_patterns_are_compiled_once_however_many_layers_and_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = [f"m.{i}" for i in range(20)]
    weights = {name.replace(LAYER, layer): array for layer in layers for name, array in adapter(1, 2).items()}
    own = config(4, 4, rank_pattern=dict.fromkeys(layers, 2), alpha_pattern={"m.3": 8})
    compiled: list[str] = []
    original = re.compile

    def counted(pattern: Any, flags: Any = 0) -> Any:
        compiled.append(pattern)
        return original(pattern, flags)

    _finder.cache_clear()
    monkeypatch.setattr("fed_learn.lora.config.re.compile", counted)
    found = fl.lora.average([weights] * 5, config=[dict(own) for _ in range(5)], method="stack")
    assert sorted(compiled) == sorted(rf"(.*\.)?({key})$" for key in [*layers, "m.3"])
    assert {layer: one.scaling for layer, one in found.report.items()} == {**dict.fromkeys(layers, 2.0), "m.3": 4.0}


def test_several_adapters_in_one_dict_are_refused_by_the_name_of_the_layer() -> None:
    named = {
        f"q.lora_{half}.{one}.weight": array
        for one in ("default", "other")
        for half, array in zip("AB", adapter(1, 2).values(), strict=True)
    }
    text = r"adapters\[0\]: 'q' has several adapters \('q.lora_A.default.weight', 'q.lora_A.other.weight'\)"
    with pytest.raises(fl.NamesError, match=rf"{text}: .*adapter_name="):
        fl.lora.average([named, named], config=config(2, 4))


def test_numbers_of_numpy_are_numbers_of_a_configuration() -> None:
    numbers: Any = {"r": np.int64(2), "lora_alpha": np.float32(3)}
    own = {**numbers, "rank_pattern": {"q": np.int32(2)}, "alpha_pattern": {"k": np.int8(1)}}
    assert fl.lora.average([adapter(1, 2)], config=own).report[LAYER].scaling == 1.5
    made = fl.lora.average([adapter(1, 2)] * 2, config=own, method="stack").config
    assert (made["r"], type(made["r"]), made["lora_alpha"], type(made["lora_alpha"])) == (4, int, 6, int)


@pytest.mark.parametrize(
    ("configs", "arguments", "text"),
    [
        ([config(2, 2, init_lora_weights="pissa")] * 2, {"method": "stack"}, "at rank 4 of the result than at rank 2"),
        ([config(2, 2, init_lora_weights="OLoRA")] * 2, {"rank": 3}, "at rank 3 of the result than at rank 2"),
        ([config(2, a, init_lora_weights="olora") for a in (1, 2)], {}, "not the same part for all adapters"),
        ([config(2, 2, init_lora_weights=init) for init in ("corda", True)], {}, "not the same part for all adapters"),
        (
            [config(2, 2, init_lora_weights="loftq")] * 2,
            {"method": "residual", "base": {"q.weight": np.zeros((7, 9))}},
            "another part once a residual is in the base",
        ),
    ],
    ids=["stack", "rank", "scalings", "one of two", "residual"],
)
def test_adapters_that_take_a_part_of_the_base_keep_their_rank(configs: Any, arguments: Any, text: str) -> None:
    with pytest.raises(fl.ConfigError, match=f"init_lora_weights=.*q'.*{text}: convert .*plain LoRA first"):
        fl.lora.average([adapter(1, 2), adapter(2, 2)], config=configs, **arguments)
    same = [config(2, alpha, init_lora_weights="pissa_niter_4") for alpha in (1, 2)]
    assert fl.lora.average([adapter(1, 2), adapter(2, 2)], config=same).report[LAYER].rank == 2


def test_a_configuration_is_read_from_its_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config(2, 6)))
    for path in (tmp_path, str(tmp_path / "adapter_config.json")):
        assert fl.lora.average([adapter(1, 2)], config=path).report[LAYER].scaling == 3
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(fl.ConfigError, match=r"adapter_config\.json' is no JSON file"):
        fl.lora.average([adapter(1, 2)], config=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"lora_alpha": 4}, "has no 'r': pass a peft.LoraConfig"),
        ({"default": config(2, 4)}, r"has no 'r': .*model.peft_config\['default'\]"),
        (3, "3 has no 'r'"),
        (config(2, 4, peft_type="ADALORA"), "is of ADALORA, and only adapters of LoRA"),
        (config(0, 4), "r must be a positive int, not 0"),
        (config(2, float("nan")), "lora_alpha must be a positive float, not nan"),
        (config(2, 4, rank_pattern=[1]), "rank_pattern must be a dict"),
        (config(2, 4, rank_pattern={"(": 1}), "'.*' is no regular expression"),
        ([config(2, 4)] * 3, "3 configurations for 2 adapters"),
    ],
    ids=["no rank", "of a model", "a number", "AdaLoRA", "rank 0", "alpha", "pattern", "expression", "count"],
)
def test_configurations_that_cannot_be_used_are_refused(wrong: Any, text: str) -> None:
    with pytest.raises(fl.ConfigError, match=text):
        fl.lora.average([adapter(1, 2), adapter(2, 2)], config=wrong)


def test_without_a_configuration_only_what_needs_no_scaling_is_done() -> None:
    for arguments in ({"rank": 3}, {"method": "stack"}, {"method": "residual", "base": {"q.weight": np.zeros((7, 9))}}):
        with pytest.raises(fl.ConfigError, match="that takes their scaling: pass config="):
            fl.lora.average([adapter(1, 2), adapter(2, 2)], **arguments)
    with pytest.raises(fl.ConfigError, match=r"have ranks \[2, 3\]"):
        fl.lora.average([adapter(1, 2), adapter(2, 3)])


def test_a_rank_other_than_the_configurations_is_refused_by_name() -> None:
    with pytest.raises(fl.ShapeError, match=r"adapters\[1\]: '.*lora_A.weight' has rank 3, and its config says 2"):
        fl.lora.average([adapter(1, 2), adapter(2, 3)], config=config(2, 4))


def changed(**arrays: Any) -> dict[str, Any]:
    return {**adapter(2, 2), **{{"A": A, "B": B}.get(name, name): array for name, array in arrays.items()}}


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({A: np.zeros((2, 9))}, fl.NamesError, "misses '.*lora_B.weight'"),
        (changed(extra=np.zeros(1)), fl.NamesError, "'extra'"),
        (changed(A=np.zeros((2, 8))), fl.ShapeError, r"lora_A.weight' has shape \(2, 8\), expected \(2, 9\)"),
        (changed(B=np.zeros((6, 2))), fl.ShapeError, r"lora_B.weight' has shape \(6, 2\), expected \(7, 2\)"),
        (changed(B=np.zeros((7, 3))), fl.ShapeError, "makes no product with '.*lora_A.weight'"),
        (changed(B=np.zeros((7, 1))), fl.ShapeError, "grouped convolutions"),
        (changed(B=np.zeros(7)), fl.ShapeError, "makes no product"),
        (changed(A=np.zeros((0, 9)), B=np.zeros((7, 0))), fl.ShapeError, "makes no product"),
        (
            changed(A=np.zeros((2, 9), np.float32)),
            fl.DtypeError,
            "expected float64: cast all adapters to one dtype",
        ),
        (changed(A=np.zeros((2, 9), np.int8)), fl.DtypeError, "int8, and a factor of LoRA has floating-point numbers"),
        (changed(B=np.full((7, 2), np.inf)), fl.NonFiniteError, r"lora_B.weight' at index \(0, 0\): inf is not finite"),
        (7, fl.WeightsTypeError, "not a dict of numpy arrays"),
        (fl.Contribution("a", {}, 1), fl.WeightsTypeError, "cannot be mixed"),
    ],
    ids=[
        "half",
        "extra",
        "inputs",
        "outputs",
        "ranks",
        "groups",
        "vector",
        "empty",
        "float32",
        "int8",
        "infinite",
        "number",
        "contribution",
    ],
)
def test_what_is_wrong_with_an_adapter_is_told_by_its_place_and_variable(wrong: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=rf"^adapters\[1\]: .*{text}"):
        fl.lora.average([adapter(1, 2), wrong])


@pytest.mark.parametrize(
    ("only", "text"),
    [
        ({A: np.zeros((2, 9))}, r"'.*lora_A.weight' comes without '.*lora_B.weight', .*rule 'mean'"),
        ({B: np.zeros((7, 2))}, r"'.*lora_B.weight' comes without '.*lora_A.weight'"),
        ({**adapter(1, 2), "q.lora_E": np.zeros(2)}, "'q.lora_E' is of AdaLoRA"),
        ({"w": np.zeros(2)}, "no variable is a factor of LoRA"),
        ({}, "no variable is a factor of LoRA"),
    ],
    ids=["A alone", "B alone", "AdaLoRA", "none", "empty"],
)
def test_adapters_without_products_are_refused(only: Any, text: str) -> None:
    with pytest.raises(fl.NamesError, match=text):
        fl.lora.average([only])


def test_arguments_that_do_not_fit_together_are_refused() -> None:
    both: Any = [adapter(1, 2), adapter(2, 2)]
    for arguments, error, text in (
        ({"method": "mean"}, ValueError, "method must be 'svd' or 'stack' or 'residual', not 'mean'"),
        ({"method": "stack", "rank": 2}, ValueError, "rank= is for method='svd'"),
        ({"method": "residual"}, ValueError, "method='residual' adds to base=: pass both"),
        ({"base": {}}, ValueError, "method='residual' adds to base=: pass both"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 1.5}, TypeError, "rank must be an int"),
        ({"aggregation_weights": [1]}, fl.AggregationWeightError, "1 aggregation weights for 2 weight dicts"),
        ({"aggregation_weights": 3}, fl.AggregationWeightError, "aggregation_weights 3 is not a list: pass a list"),
        ({"aggregation_weights": [1, -1]}, fl.AggregationWeightError, r"adapters\[1\]: aggregation weight -1"),
    ):
        with pytest.raises(error, match=text):
            fl.lora.average(both, **arguments)
    with pytest.raises(fl.EmptyAggregationError, match="no adapters"):
        fl.lora.average([])
    single: list[Any] = [both[0], fl.Contribution("a", both[0], 1)]
    for one in single:
        with pytest.raises(fl.WeightsTypeError, match=r"^adapters is one .*: pass a list of them, \[a, b, …\]"):
            fl.lora.average(one)
    sent = [fl.Contribution("a", both[0], 1), fl.Contribution("a", both[1], 1)]
    with pytest.raises(fl.DuplicateContributionError):
        fl.lora.average(sent)
    with pytest.raises(fl.AggregationWeightError, match="bring their own"):
        fl.lora.average(sent, [1, 1])
    with pytest.raises(fl.KindError):
        fl.lora.average([fl.Contribution("a", both[0], 1, kind=fl.Kind.DIFF)])


def test_results_beyond_the_range_of_a_dtype_are_refused() -> None:
    huge = {A: np.full((1, 2), 1e300), B: np.full((2, 1), 1e300)}
    with pytest.raises(fl.AggregatorError, match="leaves the range of float64"):
        fl.lora.average([huge, huge])
    half = {A: np.full((1, 2), 6e4, np.float16), B: np.full((2, 1), 6e4, np.float16)}
    found = fl.lora.average([half, half], config=config(1, 1))
    assert float(found.weights[A][0, 0]) == pytest.approx(6e4, rel=1e-3)
    with pytest.raises(fl.NonFiniteError, match="the average leaves the range of float16"):
        fl.lora.average([half, half], config=[config(1, 1), config(1, 10**6)])


def test_the_residual_makes_the_base_and_the_means_of_factors_exact() -> None:
    adapters, weights = [adapter(k, 3) for k in range(3)], [1.0, 2.0, 4.0]
    own = [config(3, alpha) for alpha in (3, 6, 9)]
    base = {"q.weight": np.random.default_rng(9).normal(size=(7, 9)), "q.bias": np.zeros(7)}
    before = base["q.weight"].copy()
    mean = dense(adapters, weights, [1.0, 2.0, 3.0])
    found = fl.lora.average(adapters, weights, config=own, method="residual", base=base)
    plain = fl.weighted_average(adapters, weights)
    assert all(near(found.weights[name], plain[name], 1e-15) for name in (A, B))
    assert found.base is not None
    assert list(found.base) == ["q.weight", "q.bias"]
    assert found.base["q.bias"] is base["q.bias"]
    assert near(found.base["q.weight"] + product(found.weights), before + mean, 1e-14)
    assert np.array_equal(base["q.weight"], before)
    naive = np.linalg.norm(product(plain) - mean) / np.linalg.norm(mean)
    assert found.report[LAYER].error == pytest.approx(naive)


@pytest.mark.parametrize(
    ("base", "error", "text"),
    [
        ({"k.weight": np.zeros((7, 9))}, fl.NamesError, "base: has no 'q.weight', nor 'base_model.model.q.base_layer"),
        ({"q.weight": np.zeros((9, 7))}, fl.ShapeError, "fan_in_fan_out="),
        (
            {"q.weight": np.zeros((7, 9), np.uint8)},
            fl.DtypeError,
            "uint8, to which nothing can be added: .*dequant",
        ),
        ({"q.weight": np.full((7, 9), 65000, np.float16)}, fl.NonFiniteError, "leaves the range of float16"),
    ],
    ids=["name", "shape", "codes", "range"],
)
def test_a_base_that_cannot_take_the_residual_is_refused(base: Any, error: Any, text: str) -> None:
    large = [{A: one[A], B: one[B] * 1000} for one in (adapter(1, 2), adapter(2, 2))]
    with pytest.raises(error, match=text):
        fl.lora.average(large, config=config(2, 4), method="residual", base=base)


def test_factors_of_several_ranks_have_no_residual() -> None:
    configs = [config(2, 2), config(3, 3)]
    with pytest.raises(fl.ShapeError, match="factors of several ranks have no mean; use method='svd' or 'stack'"):
        fl.lora.average(
            [adapter(1, 2), adapter(2, 3)], config=configs, method="residual", base={"q.weight": np.zeros((7, 9))}
        )
