"""What becomes of a variable, by its name: its policy. And which variables are codes, as their names and dtypes tell.

Most variables are averaged. Some must not be: codes of quantizers, random states. Others had better not be: the
statistics of BatchNorm where each client's data has its own. Contributions are combined by policies in `aggregation`;
the roles that models give to their variables are told by the adapters.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

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

_CODE_DTYPES = tuple(map(np.dtype, ("uint8", "int8", "uint32", "int32")))
_PACKED = (
    ("qweight", ("scales", "qzeros", "g_idx"), "packed codes of GPTQ or AWQ"),
    ("_blocks", ("_scales",), "4-bit codes (MXFP4)"),
    *((f".state{n}", (f".absmax{n}", f".qmap{n}"), "8-bit state of an optimizer of bitsandbytes") for n in (1, 2)),
    *(
        (f"/{kind}", (f"/{of}_scale", f"/{of}_zero", "/g_idx"), "codes of a quantized layer of Keras")
        for kind, of in (
            ("kernel", "kernel"),
            ("quantized_kernel", "kernel"),
            ("embeddings", "embeddings"),
            ("reverse_embeddings", "reverse_embeddings"),
        )
    ),
)
"""How the names of packed weights end, those of what is needed to unpack them, the first of which is always there, and
what they are."""
_RANDOM = re.compile(r"(^|[/._])(\w*_)?(rng|prng|key|seed)s?(_state|_key|_counter)?($|[/._])")


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

    Known by their names and dtypes alone, as those of bitsandbytes, GPTQ, Keras, Transformer Engine, torch and JAX are.

    Example:
        >>> codes_in(Schema.of({"w": np.zeros(8, np.uint8), "w.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}))
        {'w': '4-bit codes of bitsandbytes', 'w.quant_state.bitsandbytes__nf4': '4-bit codes of bitsandbytes'}
    """
    suspects = {name: dtype for name, (_, dtype) in schema.items() if dtype in _CODE_DTYPES}
    if not suspects:
        return {}
    found: dict[str, str] = {}
    for name, dtype in suspects.items():
        quantized, _, kind = name.rpartition(".quant_state.")
        if quantized and kind.startswith("bitsandbytes__"):
            parts = [other for other in schema if other == quantized or other.startswith(f"{quantized}.")]
            found |= dict.fromkeys(parts, "4-bit codes of bitsandbytes")
        elif dtype == np.int8 and f"{name.removesuffix('weight')}SCB" in schema:
            stem = name.removesuffix("weight")
            parts = [part for part in (name, f"{stem}SCB", f"{stem}weight_format") if part in schema]
            found |= dict.fromkeys(parts, "8-bit codes of bitsandbytes")
        elif (packed := _packed_parts(name, schema)) is not None:
            found |= packed
        elif dtype == np.uint8 and name.rpartition(".")[2] == "_extra_state":
            found[name] = "the extra state of a module"
        elif _is_random_state(name, schema[name][0], dtype):
            found[name] = "the state of a random generator"
    return {name: found[name] for name in schema if name in found}


def _packed_parts(name: str, schema: Schema) -> dict[str, str] | None:
    """The parts of packed weights of this name, and what they are; None if these are none."""
    for end, others, what in _PACKED:
        stem = name.removesuffix(end)
        if stem != name and stem + others[0] in schema:
            return {part: what for part in (name, *(stem + other for other in others)) if part in schema}
    return None


def _is_random_state(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether this is a random key of JAX (2 or 4 words), or the state of a generator of torch (bytes)."""
    if not _RANDOM.search(name):
        return False
    return shape[-1:] in ((2,), (4,)) if dtype == np.uint32 else dtype == np.uint8 and len(shape) == 1
