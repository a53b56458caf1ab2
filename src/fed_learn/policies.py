"""What becomes of a variable, by its name: its policy. And which variables are codes, as their names and dtypes tell.

Most variables are averaged. Some must not be: codes of quantizers, random states. Others had better not be: the
statistics of BatchNorm where each client's data has its own. Contributions are combined by policies in `aggregation`;
the roles that models give to their variables are told by the adapters.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from fed_learn.weights import Schema

Policy: TypeAlias = Literal["mean", "same", "keep", "local", "max", "sum"]
"""What becomes of a variable.

`"mean"`: contributions are combined, by the mean or another rule. `"same"`: it has to be equal everywhere, and is left
as it is. `"keep"`: the global model's own counts, whatever clients send. `"local"`: each client has its own, which is
neither sent nor asked for. `"max"`, `"sum"`: the largest, or the sum, of each element over the contributions. Of full
weights the values themselves are summed, the global model's with them once for each client; of differences what the
round has added. Equal are equal bits; where a job compares with its global model, equal values, NaN being equal to NaN.
"""

POLICIES: tuple[str, ...] = get_args(Policy)

Role: TypeAlias = Literal["trained", "statistic", "counter", "constant", "code"]
"""What a variable is to its model.

`"trained"`: training changes it, or could. `"statistic"`: an account that training keeps, as of BatchNorm. `"counter"`:
a number of steps. `"constant"`: nothing changes it, as a mask or a setting. `"code"`: bits that are no numbers to be
averaged, such as packed weights and what belongs to them, pickled states, random states.
"""

POLICY_OF_ROLE: Mapping[Role, Policy] = {
    "trained": "mean",
    "statistic": "mean",
    "counter": "mean",
    "constant": "same",
    "code": "same",
}

_CODE_DTYPES = tuple(map(np.dtype, ("uint8", "int8", "uint32", "int32", "int16")))


class _Packed(NamedTuple):
    """How packed weights are known by names.

    Attributes:
        end: How their own names end.
        needed: How those end that are always beside them.
        what: What they are.
        others: How those end that may be beside them.
    """

    end: str
    needed: tuple[str, ...]
    what: str
    others: tuple[str, ...] = ()


_PACKED = (
    _Packed("qweight", ("scales",), "packed codes of GPTQ or AWQ", ("qzeros", "g_idx")),
    _Packed("_blocks", ("_scales",), "4-bit codes (MXFP4)"),
    _Packed(
        "weight_packed",
        ("weight_scale",),
        "codes of compressed-tensors",
        ("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    ),
    _Packed("weight", ("weight_scale",), "codes of compressed-tensors", ("weight_zero_point",)),
    _Packed("weight", ("weight_scales",), "codes of EETQ"),
    _Packed(
        "W_q",
        ("scale", "zero"),
        "codes of HQQ",
        (
            *("shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype"),
            *("quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero", "offload_meta"),
            *("encoded_state_dict", "stores_quant_config"),
        ),
    ),
    _Packed("._data", ("._scale",), "codes of optimum-quanto", ("._shift",)),
    _Packed("._data._data", ("._scale",), "codes of optimum-quanto", ("._shift",)),
    _Packed("codes", ("codebooks", "scales"), "codes of AQLM"),
    *(
        _Packed(f".state{n}", (f".absmax{n}",), "8-bit state of an optimizer of bitsandbytes", (f".qmap{n}",))
        for n in (1, 2)
    ),
    *(
        _Packed(f"/{kind}", (f"/{of}_scale",), "codes of a quantized layer of Keras", (f"/{of}_zero", "/g_idx"))
        for kind, of in (
            ("kernel", "kernel"),
            ("quantized_kernel", "kernel"),
            ("embeddings", "embeddings"),
            ("reverse_embeddings", "reverse_embeddings"),
        )
    ),
)
_RANDOM = re.compile(r"(^|[/._])(\w*_)?(rng|prng|key|seed)s?(_state|_key|_counter)?($|[/._])")
_STREAMS = re.compile(r"(^|[/._])(dropout|params|noise|sampling|sample|default|carry|init|augment(ation)?)$")
"""What keys of JAX are often called beside `key` and `rng`: by what they are for."""


class Policies(Mapping[str, str]):
    """Regular expressions of variables' names and their policies, in order: the first that is found in a name decides.

    Args:
        policies: As in `{"bn": "local", "steps": "max"}`; see `Policy`.

    Raises:
        ValueError: An expression is none, or there is no such policy.
        TypeError: It is no mapping of text to text.

    Example:
        >>> policies = Policies({"bn[0-9]": "local", "steps": "max"})
        >>> policies.of("layer1.bn2.weight"), policies.of("fc.weight")
        ('local', None)
        >>> Policies({"bn": "lokal"})
        Traceback (most recent call last):
        ...
        ValueError: policies: 'bn' has the policy 'lokal'; there are 'mean', 'same', 'keep', 'local', 'max', 'sum'
    """

    def __init__(self, policies: Mapping[str, str] | None = None) -> None:
        if policies is not None and not isinstance(policies, Mapping):
            raise TypeError(f"policies must be a dict of regular expressions to policies, not {policies!r}")
        self._policies = dict(policies or {})
        for pattern, policy in self._policies.items():
            if not isinstance(pattern, str):
                raise TypeError(f"policies: {pattern!r} must be the text of a regular expression")
            if policy not in POLICIES:
                known = ", ".join(map(repr, POLICIES))
                raise ValueError(f"policies: {pattern!r} has the policy {policy!r}; there are {known}")
        self._patterns = _compiled(tuple(self._policies.items()))

    def of(self, name: str) -> str | None:
        """The policy of a variable of this name; None: no expression is found in it."""
        return next((policy for pattern, policy in self._patterns if pattern.search(name)), None)

    def __getitem__(self, pattern: str) -> str:
        return self._policies[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._policies)

    def __len__(self) -> int:
        return len(self._policies)

    def __repr__(self) -> str:
        return f"Policies({self._policies!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Policies, (self._policies,)


@lru_cache(maxsize=100)
def _compiled(policies: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    try:
        return tuple((re.compile(pattern), policy) for pattern, policy in policies)
    except re.error as error:
        raise ValueError(f"policies: {error.pattern!r} is no regular expression: {error}") from error


def expression_of(name: str) -> str:
    """The regular expression that is found in one name alone.

    Example:
        >>> print(expression_of("fc1"))
        ^fc1$
    """
    return f"^{re.escape(name)}$"


def codes_in(schema: Schema) -> dict[str, str]:
    """Variables that are codes, whatever their numbers say, and what they are, in a few words.

    Known by their names, shapes and dtypes alone: those of bitsandbytes, GPTQ, AWQ, compressed-tensors, HQQ, EETQ,
    AQLM, optimum-quanto, Keras and Transformer Engine, and the random states of torch and JAX.

    Example:
        >>> codes_in(Schema.of({"w": np.zeros(8, np.uint8), "w.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}))
        {'w': '4-bit codes of bitsandbytes', 'w.quant_state.bitsandbytes__nf4': '4-bit codes of bitsandbytes'}
    """
    suspects = {name: dtype for name, (_, dtype) in schema.items() if dtype in _CODE_DTYPES}
    if not suspects:
        return {}
    found = _four_bits(suspects, schema)
    for name, dtype in suspects.items():
        if name in found:
            continue
        if dtype == np.int8 and f"{name.removesuffix('weight')}SCB" in schema:
            stem = name.removesuffix("weight")
            parts = [part for part in (name, f"{stem}SCB", f"{stem}weight_format") if part in schema]
            found |= dict.fromkeys(parts, "8-bit codes of bitsandbytes")
        elif (packed := _packed_parts(name, schema)) is not None:
            found |= packed
        elif dtype == np.uint8 and name.rpartition(".")[2] == "_extra_state":
            found[name] = "the extra state of a module"
        elif (random := random_state(name, schema[name][0], dtype)) is not None:
            found[name] = random
    return {name: found[name] for name in schema if name in found}


def _four_bits(suspects: Collection[str], schema: Schema) -> dict[str, str]:
    """4-bit weights of bitsandbytes: `NAME`, if there is a `NAME.quant_state.bitsandbytes__…`, and what is below it."""
    splits = [name.rpartition(".quant_state.") for name in suspects]
    quantized = {stem for stem, _, kind in splits if stem and kind.startswith("bitsandbytes__")}
    if not quantized:
        return {}
    stems = ({name, name.rpartition(".")[0], name.rpartition(".quant_state.")[0]} for name in schema)
    parts = [name for name, own in zip(schema, stems, strict=True) if not own.isdisjoint(quantized)]
    return dict.fromkeys(parts, "4-bit codes of bitsandbytes")


def _packed_parts(name: str, schema: Schema) -> dict[str, str] | None:
    """The parts of packed weights of this name, and what they are; None if these are none."""
    for end, needed, what, others in _PACKED:
        stem = name.removesuffix(end)
        if stem != name and all(stem + other in schema for other in needed):
            return {part: what for part in (name, *(stem + other for other in needed + others)) if part in schema}
    return None


def random_state(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
    """What a random key of JAX is (2 or 4 words), or the state of a generator of torch (bytes); None: this is none.

    A raw key of JAX is known by its form and its name, which may be that of what it is for. It may be another thing all
    the same, so a policy always wins.

    Example:
        >>> random_state("dropout", (2,), np.dtype(np.uint32)), random_state("class_counts", (2,), np.dtype(np.uint32))
        ('a random key, as it seems', None)
    """
    key = dtype == np.uint32 and shape[-1:] in ((2,), (4,))
    if _RANDOM.search(name) and (key or (dtype == np.uint8 and len(shape) == 1)):
        return "the state of a random generator"
    return "a random key, as it seems" if key and _STREAMS.search(name) else None
