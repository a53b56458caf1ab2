"""Sums of low-rank products `Σ cₖ·Bₖ·Aₖ`, as LoRA's layers make them, from their factors alone.

The mean of products is not the product of means. So factors of the weighted sum are made of the clients' factors:
`best` are those of a given rank, `stacked` exact ones of the sum of the ranks; `remainder` is what the `means` of the
factors leave out. Here are also the names by which layers are found. How adapters are opened, and what their scalings
are, is left to `fed_learn.lora` and to the rule.

All of it is computed in float64 by LAPACK as numpy has it. The same inputs in the same order give the same bits on one
machine with one number of threads; elsewhere they may differ in the last bits of float64, before they are rounded.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.errors import AggregatorError, DtypeError, NamesError, ShapeError
from fed_learn.weights import Array, Schema, about, listed

Matrix: TypeAlias = npt.NDArray[np.float64]

_FACTOR = re.compile(
    r"(?P<module>(?:.*\.)?)lora_(?P<embedding>embedding_)?(?P<half>[AB])(?P<end>(?:\.(?!bias$)[^.]+)?(?:\.weight)?)"
)
_BIAS = re.compile(r"(?:.*\.)?lora_B(?:\.[^.]+)?\.bias")
_OTHER_FORMS = re.compile(r"(^|\.)lora_E($|\.)")


@dataclass(frozen=True)
class Layer:
    """A layer with an adapter, `W + s·B·A`.

    Attributes:
        module: The name of the layer.
        a: The name of its variable A, of shape (rank, inputs …).
        b: The name of its variable B, of shape (outputs, rank …).
        bias: The name of the bias of B, where it has one; it is scaled as the product is.
        embedding: Whether the layer is an embedding, whose weight is the transpose of `B·A`.
    """

    module: str
    a: str
    b: str
    bias: str | None
    embedding: bool


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors of a product `B·A`.

    Attributes:
        b: Of shape (outputs, rank).
        a: Of shape (rank, inputs).
        error: The distance of the product to the sum that it stands for, by the Frobenius norm, relative to the sum.
    """

    b: Matrix
    a: Matrix
    error: float = 0.0


def layers_in(schema: Schema, who: str | None = None) -> list[Layer]:
    """The layers with adapters among the variables, named as PEFT names them in its files and in models.

    Args:
        schema: Names, shapes and dtypes of variables.
        who: Whose they are, for errors.

    Raises:
        NamesError: A factor is without the other, the adapters are of another form, or there are none.
        ShapeError, DtypeError: Factors are no numbers, or have no product.

    Example:
        >>> schema = Schema.of({"q.lora_A.weight": np.zeros((1, 3)), "q.lora_B.weight": np.zeros((2, 1))})
        >>> [layer.module for layer in layers_in(schema)]
        ['q']
    """
    found = _layers_named(schema, who)
    for layer in found:
        _check_factors(layer, schema, who)
    return found


def _layers_named(names: Collection[str], who: str | None) -> list[Layer]:
    for name in names:
        if _OTHER_FORMS.search(name):
            message = f"{about(who, name)}is of AdaLoRA, whose products have a third factor: only LoRA's are averaged"
            raise NamesError(message, contributor=who, name=name)
    found = []
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        module, embedding, end = match["module"], match["embedding"] or "", match["end"]
        a, b = (f"{module}lora_{embedding}{half}{end}" for half in "AB")
        other = b if name == a else a
        if other not in names:
            raise NamesError(
                f"{about(who)}{name!r} comes without {other!r}, and only both together say what the layer has learned; "
                "where one of them is frozen, and the same everywhere, the mean of the other is exact (rule 'mean')",
                contributor=who,
                name=name,
                missing=(other,),
            )
        if name == a:
            bias = f"{b.removesuffix('weight')}bias" if end.endswith(".weight") else None
            found.append(Layer(module.removesuffix("."), a, b, bias if bias in names else None, bool(embedding)))
    if not found:
        some = f"; there are {listed(names)}" if names else ""
        raise NamesError(
            f"{about(who)}no variable is a factor of LoRA, as '….lora_A.weight' and '….lora_B.weight' are{some}",
            contributor=who,
        )
    strays = [name for name in names if _BIAS.fullmatch(name) and name not in {layer.bias for layer in found}]
    if strays:
        raise NamesError(f"{about(who)}{strays[0]!r} is the bias of a factor that is not there", contributor=who)
    return found


def _check_factors(layer: Layer, schema: Schema, who: str | None) -> None:
    """Refuses factors that have no product."""
    for name in (layer.a, layer.b):
        dtype = schema[name][1]
        if dtype.kind in "biu":
            message = f"{about(who, name)}has dtype {dtype}, and a factor of LoRA has floating-point numbers"
            raise DtypeError(message, contributor=who, name=name, dtype=dtype, expected=None)
    a, b = schema[layer.a][0], schema[layer.b][0]
    if len(a) < 2 or len(b) < 2 or 0 in a + b or b[1] != a[0] or any(size != 1 for size in b[2:]):
        is_split = len(a) > 1 < len(b) and b[1] and a[0] > b[1] and not a[0] % b[1]
        raise ShapeError(
            f"{about(who, layer.b)}has shape {b}, which makes no product with {layer.a!r} of shape {a}"
            + ("; adapters of grouped convolutions are not averaged: leave them out (only=)" if is_split else ""),
            contributor=who,
            name=layer.b,
            shape=b,
            expected=(*b[:1], *a[:1]),
        )


def as_matrices(a: Array, b: Array) -> Factors:
    """The factors of a layer as float64 matrices; those of convolutions are flattened."""
    return Factors(np.asarray(b, np.float64).reshape(b.shape[0], -1), np.asarray(a, np.float64).reshape(a.shape[0], -1))


def shares(aggregation_weights: Sequence[float]) -> list[float]:
    """Aggregation weights divided by their sum; that may leave the range of float64.

    Example:
        >>> shares([300, 100])
        [0.75, 0.25]
    """
    largest = max(aggregation_weights)
    parts = [weight / largest for weight in aggregation_weights]
    total = sum(parts)
    return [part / total for part in parts]


def best(terms: Sequence[Factors], coefficients: Sequence[float], rank: int, scaling: float = 1.0) -> Factors:
    """Factors of a rank whose product, times the scaling, is the best approximation of `Σ cₖ·Bₖ·Aₖ`.

    It is the truncated singular value decomposition (Eckart and Young 1936) of the sum, which is never formed: the
    stacked factors are reduced to triangles by QR, and the decomposition is that of the product of two triangles, of at
    most as many rows as all ranks together. A singular value σ is split evenly, √σ to each factor. Of the signs, which
    are free, those are taken that make the entry of each column of B that is largest in magnitude positive.

    Where the sum has a lower rank, columns of B are 0, and rows of A span what the clients' rows span, at their usual
    length: so starts LoRA as well, and training can go on, which it could not if both were 0.

    Args:
        terms: The factors.
        coefficients: What each product counts by.
        rank: Of the result; any.
        scaling: By which the result will be multiplied.

    Raises:
        AggregatorError: The sum leaves the range of float64.
    """
    stacked_b, stacked_a = _stacks(terms, coefficients)
    (left, upper), (right, lower) = np.linalg.qr(stacked_b), np.linalg.qr(stacked_a.T)
    with np.errstate(over="ignore", invalid="ignore"):
        core = upper @ lower.T
    if not np.isfinite(core).all():
        raise AggregatorError("the sum of the products leaves the range of float64")
    u, values, vt = np.linalg.svd(core, full_matrices=False)
    noise = np.finfo(np.float64).eps * max(core.shape) * np.linalg.norm(upper) * np.linalg.norm(lower)
    kept = values[: min(rank, int((values > noise).sum()))]
    b, a = left @ u[:, : kept.size], vt[: kept.size] @ right.T
    largest = b[np.abs(b).argmax(axis=0), np.arange(kept.size)]
    split = np.sqrt(kept / scaling)
    signs = np.where(largest < 0, -split, split)
    b, a = b * signs, a * signs[:, None]
    missing = rank - kept.size
    if missing:
        rows = (vt @ right.T)[kept.size :] if kept.size < values.size else right.T
        length = np.sqrt(np.mean([float(np.square(term.a).sum()) / len(term.a) for term in terms]))
        rest = rows[np.arange(missing) % len(rows)] * length
        a, b = np.vstack([a, rest]), np.hstack([b, np.zeros((len(b), missing))])
    whole = float(np.linalg.norm(values))
    return Factors(b, a, float(np.linalg.norm(values[kept.size :])) / whole if whole > noise else 0.0)


def stacked(terms: Sequence[Factors], coefficients: Sequence[float], scaling: float = 1.0) -> Factors:
    """Factors whose product, times the scaling, is `Σ cₖ·Bₖ·Aₖ`: all factors side by side, coefficients with A."""
    a = np.vstack([term.a * (c / scaling) for term, c in zip(terms, coefficients, strict=True)])
    return Factors(np.hstack([term.b for term in terms]), a)


def means(terms: Sequence[Factors], parts: Sequence[float]) -> Factors:
    """The weighted means of the factors, whose product is not the mean of the products."""
    pairs = list(zip(parts, terms, strict=True))
    b: Matrix = np.sum([part * term.b for part, term in pairs], axis=0)
    return Factors(b, np.sum([part * term.a for part, term in pairs], axis=0))


def remainder(
    terms: Sequence[Factors], coefficients: Sequence[float], made: Factors, scaling: float
) -> tuple[Matrix, float]:
    """What a product leaves out of `Σ cₖ·Bₖ·Aₖ`, as a whole matrix; and its norm, relative to the sum."""
    stacked_b, stacked_a = _stacks(terms, coefficients)
    rest: Matrix = np.hstack([stacked_b, -scaling * made.b]) @ np.vstack([stacked_a, made.a])
    (_, upper), (_, lower) = np.linalg.qr(stacked_b), np.linalg.qr(stacked_a.T)
    whole = float(np.linalg.norm(upper @ lower.T))
    return rest, float(np.linalg.norm(rest)) / whole if whole else 0.0


def _stacks(terms: Sequence[Factors], coefficients: Sequence[float]) -> tuple[Matrix, Matrix]:
    """All B side by side, times their coefficients, and all A below one another, of like magnitude in each term.

    A power of two goes from one factor to the other: it changes no bit of a product, and nothing is lost beside a
    factor of another client that is large only because its other factor is small.
    """
    halves = [(_exponent(term.b) - _exponent(term.a)) // 2 for term in terms]
    b = [np.ldexp(term.b, -h) * c for term, c, h in zip(terms, coefficients, halves, strict=True)]
    a = [np.ldexp(term.a, h) for term, h in zip(terms, halves, strict=True)]
    return np.hstack(b), np.vstack(a)


def _exponent(matrix: Matrix) -> int:
    largest: Any = np.abs(matrix).max(initial=0.0)
    return int(np.frexp(largest)[1])
