"""The rule for adapters of LoRA: the products of their factors are averaged, and factored again at the same rank."""

import logging
from typing import ClassVar

import numpy as np

from fed_learn.aggregation.low_rank import Factors, Layer, as_matrices, best, layers_in, shares
from fed_learn.aggregation.mean import mean
from fed_learn.aggregation.rules.base import Given, Rule, register
from fed_learn.aggregation.tensors import schema_of
from fed_learn.contribution import Contribution, Kind
from fed_learn.errors import AggregatorError
from fed_learn.weights import Array, FrozenWeights, Schema, WeightDict

logger = logging.getLogger(__name__)


@register
class LoraRule(Rule):
    """The best approximation of the weighted mean of LoRA's products `B·A`, at the rank of the global model.

    All clients have the rank and the scaling of the global model, so the scaling cancels. All other variables, such as
    a head that is trained beside the adapters, get the weighted mean. Differences are added to the global model first,
    since a product of differences is no difference of products. Adapters of several ranks, exact sums of a higher rank,
    and the exact mean with a residual in the base are for `fed_learn.lora.average`.

    Unlike with other rules, the last bits of a result may depend on the machine and on its number of BLAS threads,
    since QR and the singular value decomposition are those of numpy's LAPACK.

    Two factors are known only up to an invertible matrix between them. The result has other factors than each client's,
    even where all products are the same: a client should begin its round with a new optimizer.

    Example:
        >>> import fed_learn as fl
        >>> one = {"q.lora_A.weight": np.array([[1.0, 0.0]]), "q.lora_B.weight": np.array([[2.0], [0.0]])}
        >>> other = {"q.lora_A.weight": np.array([[-1.0, 0.0]]), "q.lora_B.weight": np.array([[-2.0], [0.0]])}
        >>> made = fl.aggregate([one, other], rule="lora")  # the plain mean of the factors would be 0
        >>> (made["q.lora_B.weight"] @ made["q.lora_A.weight"]).round(12).tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """

    name: ClassVar[str] = "lora"

    def check_settings(self, *, kind: Kind, partial: str, exact: bool, stream: bool) -> None:
        """Refuses what belongs to sums of each variable by itself."""
        super().check_settings(kind=kind, partial=partial, exact=exact, stream=stream)
        if exact:
            raise ValueError("rule 'lora' has no exact sums: leave exact=True out")
        if partial == "average":
            raise ValueError("rule 'lora' needs both factors of each layer: partial='average' would part them")

    def check(self, contribution: Contribution) -> None:
        """Refuses one without adapters, or with half of one."""
        who, weights = contribution.contributor, contribution.weights
        # What else there is may be anything, as long as it is the same everywhere: the extra state of a module.
        named = {name: value for name, value in (weights or {}).items() if "lora_" in name}
        layers_in(schema_of(named, who), who)

    def combine(self, given: Given) -> WeightDict:
        """The factors of the mean of the products, and the mean of all else."""
        rows = [row.on_host() for row in given.rows]
        base = self._base(given)
        layers = layers_in(given.schema)
        factors = {name for layer in layers for name in (layer.a, layer.b)}
        others = Schema({name: form for name, form in given.schema.items() if name not in factors})
        made = dict(mean([row.only(list(others)) for row in rows], others, kernel=given.kernel)) if others else {}
        parts, errors = shares([row.aggregation_weight for row in rows]), {}
        for layer in layers:
            terms = [_factors(layer, row.arrays, base) for row in rows]
            result = best(terms, parts, len(terms[0].a))
            errors[layer.a] = result.error
            for name, matrix in ((layer.a, result.a), (layer.b, result.b)):
                whole = matrix.reshape(given.schema[name][0])
                made[name] = whole if base is None else whole - base[name].astype(np.float64)
        worst = max(errors, key=lambda name: errors[name])
        logger.info(
            "rule 'lora': the factors of %d layers leave out at most %.3g of the mean (%s)",
            len(layers),
            errors[worst],
            worst,
        )
        return made

    def _base(self, given: Given) -> FrozenWeights | None:
        """The global model, where contributions are differences to it."""
        sent = given.rows[0].contribution
        if sent is None or sent.kind is Kind.FULL:
            return None
        if given.model is None:
            raise AggregatorError(
                "a product of differences is no difference of products, and the global model to which they belong is "
                "not known: send full weights (kind=Kind.FULL)"
            )
        return given.model


def _factors(layer: Layer, arrays: WeightDict, base: FrozenWeights | None) -> Factors:
    if base is None:
        return as_matrices(arrays[layer.a], arrays[layer.b])
    a, b = (_wide(arrays[name]) + _wide(base[name]) for name in (layer.a, layer.b))
    return as_matrices(a, b)


def _wide(array: Array) -> Array:
    return array.astype(np.float64)
