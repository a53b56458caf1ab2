"""`average`: adapters of LoRA, of whatever ranks and scalings, become one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fed_learn.aggregation import weighted_average
from fed_learn.aggregation.batch import Checked, Terms
from fed_learn.aggregation.low_rank import (
    Factors,
    Layer,
    as_matrices,
    best,
    layers_in,
    means,
    remainder,
    shares,
    stacked,
)
from fed_learn.aggregation.mean import counting
from fed_learn.aggregation.outputs import outputs_for
from fed_learn.aggregation.strict import scanned
from fed_learn.aggregation.tensors import Place
from fed_learn.arguments import check_choice, check_count
from fed_learn.contribution import (
    Contribution,
    Kind,
    check_aggregation_weight,
    listed_contributions,
    listed_weights,
)
from fed_learn.errors import (
    AggregationWeightError,
    ConfigError,
    EmptyAggregationError,
    NonFiniteError,
    ShapeError,
    WeightsTypeError,
)
from fed_learn.lora.base_model import Base
from fed_learn.lora.checks import check_alike, check_bases, check_single
from fed_learn.lora.config import LoraSettings
from fed_learn.weights import Array, Schema, WeightDict, fitted

Method: TypeAlias = Literal["svd", "stack", "residual"]
METHODS: tuple[str, ...] = get_args(Method)
Config: TypeAlias = Any
"""A `peft.LoraConfig`, a dict of its fields, or the path of an `adapter_config.json`."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        ranks: The ranks of the adapters that count, in the order in which they are summed.
        rank: The rank of the result.
        scaling: By what the product of the result is multiplied; None: no configuration is known.
        error: How far the product of the result is from the mean of the products, by the Frobenius norm, relative to
            the mean, before it is rounded. With `method="residual"` the base makes up for this.
    """

    ranks: tuple[int, ...]
    rank: int
    scaling: float | None
    error: float


@dataclass(frozen=True, eq=False)
class LoraAverage:
    """The average of adapters.

    Attributes:
        weights: The adapter, under the names and in the dtypes of the first one: arrays, or tensors.
        config: What loads it: the first configuration, with other ranks and alphas where those of the result are
            others; of the kind that was given, a dict for a path; None where none was given.
        report: What became of each layer, by its name.
        base: With `method="residual"` the base with what the adapter leaves out; else None.
    """

    weights: WeightDict
    config: Config
    report: dict[str, LayerReport]
    base: WeightDict | None = None


def average(
    adapters: Iterable[WeightDict] | Iterable[Contribution],
    aggregation_weights: Sequence[float] | None = None,
    *,
    config: Config | Sequence[Config] = None,
    rank: int | None = None,
    method: Method = "svd",
    base: WeightDict | None = None,
) -> LoraAverage:
    """The weighted mean of what adapters of LoRA add to a model, `Σ wₖ·sₖ·Bₖ·Aₖ / Σ wₖ`, as an adapter.

    - `method="svd"`: the best approximation of a rank, by the Frobenius norm (as FlexLoRA, arXiv 2402.11505, but by QR
      of the factors: the mean is never formed). A singular value is split evenly between A and B.
    - `method="stack"`: the mean itself, at the sum of all ranks (as FLoRA, arXiv 2409.05976).
    - `method="residual"`: the means of the factors; what they leave out is added to the base, which all clients then
      need (FedEx-LoRA, arXiv 2410.09432). For adapters of one rank.

    All other variables get their weighted mean: `modules_to_save`, biases, and the magnitudes of DoRA. Those belong
    beside a direction `W + s·B·A` of which the mean is exact here; DoRA's product of both is not linear, and has no
    exact mean of this form.

    PiSSA, OLoRA, CorDA and LoftQ (`init_lora_weights`) take a part of their rank out of the base whenever PEFT loads
    them. Such adapters are averaged at their own rank alone; for others, convert them to plain LoRA, as PEFT does.

    Taken are the adapters as `peft.get_peft_model_state_dict`, `adapter_model.safetensors` and `model.state_dict()`
    have them, for linear layers, embeddings and convolutions without groups. Sums are taken in float64, in the order of
    the contributors' names or, for bare weight dicts, of the list, and rounded once.

    Args:
        adapters: Weight dicts of arrays or tensors, or `Contribution`s of full weights; all of the same names and, but
            for ranks, the same shapes. One whose weight is 0 is checked, and adds nothing.
        aggregation_weights: One number ≥ 0 per weight dict; None: they count equally. `Contribution`s bring their own.
        config: The configuration of all adapters, or a list with that of each. None: all have the same scaling, which
            then cancels; this is enough for adapters of one rank.
        rank: With `method="svd"`, the rank of every layer; None: in each the largest of the adapters'.
        method: See above.
        base: With `method="residual"`, the weights of the base model, by its own names or by those it has inside of a
            PEFT model. It is not changed.

    Returns:
        The adapter, what loads it, and the relative error of each layer.

    Raises:
        ContributionError: Something is wrong with an adapter; the class says what, the attributes who and where.
        EmptyAggregationError: There are no adapters, or none counts by more than 0.
        ConfigError: A configuration cannot be used, or not for such a result.
        AggregatorError: A sum leaves the range of float64.
        ValueError: The arguments do not fit together.

    Example:
        >>> one = {"q.lora_A.weight": np.array([[1.0, 0.0]]), "q.lora_B.weight": np.array([[1.0], [0.0]])}
        >>> other = {"q.lora_A.weight": np.array([[0.0, 1.0]]), "q.lora_B.weight": np.array([[0.0], [1.0]])}
        >>> average([one, other], [3, 1]).report["q"].error < 0.32  # what rank 1 leaves out, relative to the mean
        True
        >>> made = average([one, other], config={"r": 1, "lora_alpha": 1}, method="stack")
        >>> made.config["r"], made.config["lora_alpha"]
        (2, 2)
    """
    check_choice("method", method, METHODS)
    if rank is not None and method != "svd":
        raise ValueError(f"rank= is for method='svd': method={method!r} decides on ranks itself")
    if (base is not None) != (method == "residual"):
        raise ValueError("method='residual' adds to base=: pass both, or neither")
    chosen = listed_contributions(adapters, what="adapters")
    settings = _settings(config, len(chosen))
    rows, place = _opened(chosen, aggregation_weights)
    sums = _Sums.of(rows, settings, method, None if rank is None else check_count("rank", rank))
    whole = None if base is None else Base(base)
    made: dict[str, Array] = {}
    report: dict[str, LayerReport] = {}
    for layer in sums.layers:
        result, report[layer.module] = sums.layer(layer, whole)
        a, b = sums.schema[layer.a][0], sums.schema[layer.b][0]
        made[layer.a] = result.a.reshape(len(result.a), *a[1:])
        made[layer.b] = result.b.reshape(*result.b.shape, *b[2:])
        if layer.bias is not None:
            made[layer.bias] = sums.bias(layer, report[layer.module])
    made = {name: _rounded(array, name, sums.schema) for name, array in made.items()} | dict(sums.rest(made))
    outputs = outputs_for(
        Schema({name: (made[name].shape, form[1]) for name, form in sums.schema.items()}), place, None
    )
    for name, target in outputs.arrays.items():
        target[...] = made[name]
    return LoraAverage(outputs.finish(), sums.config(report), report, None if whole is None else whole.finish())


def _settings(config: Any, count: int) -> list[LoraSettings | None]:
    """The settings of each adapter."""
    if config is None:
        return [None] * count
    if not isinstance(config, list | tuple):
        return [LoraSettings.of(config)] * count
    if len(config) != count:
        raise ConfigError(
            f"config: {len(config)} configurations for {count} adapters; pass one for all, or one for each"
        )
    return [LoraSettings.of(one) for one in config]


def _opened(adapters: list[Any], aggregation_weights: Sequence[float] | None) -> tuple[list[Checked], Place | None]:
    """The adapters as arrays, all of them finite, in the order in which they are listed; and where the first one is."""
    if not adapters:
        raise EmptyAggregationError("no adapters to average")
    of_contributions = isinstance(adapters[0], Contribution)
    if of_contributions and aggregation_weights is not None:
        raise AggregationWeightError(
            "aggregation_weights= is for bare weight dicts; Contributions bring their own", value=aggregation_weights
        )
    given = listed_weights(aggregation_weights, len(adapters))
    rows: dict[str, Checked] = {}
    place: Place | None = None
    for i, (adapter, weight) in enumerate(zip(adapters, given, strict=True)):
        who = f"adapters[{i}]"
        if isinstance(adapter, Contribution) is not of_contributions:
            raise WeightsTypeError(f"{who}: weight dicts and Contributions cannot be mixed", contributor=who)
        if of_contributions:
            row = Terms(kind=Kind.FULL).check(adapter, rows)
        else:
            row = Terms().check_weights(adapter, check_aggregation_weight(weight, who), who)
        place = row.held.place if i == 0 else place
        rows[row.contributor] = scanned(row.on_host())
    return list(rows.values()), place


@dataclass(frozen=True, eq=False)
class _Sums:
    """The adapters that count, in the order in which they are summed, and how.

    Attributes:
        rows: The adapters.
        settings: Those of each; None: not known.
        parts: What each counts by, of 1.
        schema: Names, shapes and dtypes of the first adapter that was listed.
        layers: The layers in it.
        method: See `average`.
        rank: See `average`.
    """

    rows: list[Checked]
    settings: list[LoraSettings | None]
    parts: list[float]
    schema: Schema
    layers: list[Layer]
    method: Method
    rank: int | None

    @classmethod
    def of(cls, rows: list[Checked], settings: list[LoraSettings | None], method: Method, rank: int | None) -> "_Sums":
        schema = Schema.of(rows[0].arrays)
        layers = layers_in(schema, rows[0].contributor)
        check_single(layers, rows[0].contributor)
        pairs = list(zip(rows, settings, strict=True))
        for row, own in pairs:
            check_alike(row, own, layers, schema)
        if rows[0].contribution is not None:
            pairs.sort(key=lambda pair: pair[0].contributor)
        counting(rows)  # at least one does
        pairs = [(row, own) for row, own in pairs if row.aggregation_weight]
        kept = [row for row, _ in pairs]
        parts = shares([row.aggregation_weight for row in kept])
        return cls(kept, [own for _, own in pairs], parts, schema, layers, method, rank)

    def layer(self, layer: Layer, base: Base | None) -> tuple[Factors, LayerReport]:
        """The factors of a layer, and what became of it; with a base, that is given what they leave out."""
        terms = [as_matrices(row.arrays[layer.a], row.arrays[layer.b]) for row in self.rows]
        ranks = tuple(len(term.a) for term in terms)
        own, coefficients, scaling = self._scalings(layer)
        rank = max(ranks) if self.rank is None else self.rank
        if own is None and (self.method != "svd" or {*ranks, rank} != {ranks[0]}):
            raise ConfigError(
                f"{layer.module!r}: the adapters have ranks {sorted({*ranks})}, the result another, or a base is "
                "added to; that takes their scaling: pass config= (a peft.LoraConfig, or a list with that of each)"
            )
        made_rank = sum(ranks) if self.method == "stack" else rank
        check_bases(self.settings, layer.module, ranks[0], made_rank, residual=base is not None)
        if self.method == "svd":
            made = best(terms, coefficients, rank, scaling)
        elif self.method == "stack":
            made = stacked(terms, coefficients, scaling)
        else:
            made = self._means(layer, terms)
        if base is not None and own is not None:
            left, error = remainder(terms, coefficients, made, scaling)
            shape = (len(left), *self.schema[layer.a][0][1:])
            base.add(layer, left.reshape(shape), transposed=layer.embedding or (own.fan_in_fan_out and len(shape) == 2))
            made = replace(made, error=error)
        return made, LayerReport(ranks, len(made.a), None if own is None else scaling, made.error)

    def bias(self, layer: Layer, report: LayerReport) -> Array:
        """The bias of a layer's B, which is scaled as the product is."""
        assert layer.bias is not None
        _, coefficients, scaling = self._scalings(layer)
        biases = [row.arrays[layer.bias].astype(np.float64) for row in self.rows]
        total: Array = np.sum([b * (c / scaling) for b, c in zip(biases, coefficients, strict=True)], axis=0)
        return total

    def rest(self, made: WeightDict) -> WeightDict:
        """The weighted mean of all variables but those that are made already."""
        names = [name for name in self.schema if name not in made]
        if not names:
            return {}
        parts = [{name: row.arrays[name] for name in names} for row in self.rows]
        return weighted_average(parts, [row.aggregation_weight for row in self.rows])

    def config(self, report: Mapping[str, LayerReport]) -> Config:
        """The configuration of the result."""
        own = self.settings[0]
        if own is None:
            return None
        ranks = {module: one.rank for module, one in report.items()}
        return own.with_layers(ranks, {module: own.alpha_for(module, rank) for module, rank in ranks.items()})

    def _scalings(self, layer: Layer) -> tuple[LoraSettings | None, list[float], float]:
        """The settings of the result, what each product counts by, and the scaling of the result."""
        module, first = layer.module, self.settings[0]
        if first is None:
            return None, self.parts, 1.0
        known = [own for own in self.settings if own is not None]
        scalings = [own.scaling_of(module) for own in known]
        return first, [part * scaling for part, scaling in zip(self.parts, scalings, strict=True)], scalings[0]

    def _means(self, layer: Layer, terms: Sequence[Factors]) -> Factors:
        """The means of the factors, as they are once they have been rounded."""
        for row, term in zip(self.rows, terms, strict=True):
            if len(term.a) != len(terms[0].a):
                raise ShapeError(
                    f"{row.contributor}: {layer.a!r} has rank {len(term.a)}, and {self.rows[0].contributor} has "
                    f"{len(terms[0].a)}: factors of several ranks have no mean; use method='svd' or 'stack'",
                    contributor=row.contributor,
                    name=layer.a,
                    shape=term.a.shape,
                    expected=terms[0].a.shape,
                )
        made = means(terms, self.parts)
        a, b = (_rounded(half, name, self.schema) for half, name in ((made.a, layer.a), (made.b, layer.b)))
        return as_matrices(a, b)


def _rounded(array: Array, name: str, schema: Schema) -> Array:
    """A result rounded to the dtype of the inputs.

    Raises:
        NonFiniteError: A value leaves the range of the dtype.
    """
    dtype = schema[name][1]
    near = fitted(array, dtype)
    if near is None:
        raise NonFiniteError(f"{name!r}: the average leaves the range of {dtype}", name=name, index=(), value=np.inf)
    return near
