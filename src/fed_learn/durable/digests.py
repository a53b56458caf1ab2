"""The digest of a weight dict: BLAKE3 over what a variable is called, its dtype, its shape and its values.

Another program computes the same: for each variable, in the order of names, the line

    name, dtype, shape, BLAKE3 of the values

as JSON `["layer.weight","float32",[8,4],"<64 hex digits>"]`, without spaces, followed by a newline; the digest is
BLAKE3 (256 bits) of these lines in UTF-8. Values are little-endian, in C order; the dtype has the name that numpy or
ml_dtypes gives it (`bfloat16`).
"""

import json
import sys
from typing import Any

import numpy as np

from fed_learn.weights import Array, WeightDict

SEVERAL_THREADS = 1 << 20
"""Bytes from which on several threads are worth their while; the digest is the same."""


def digest(weights: WeightDict) -> str:
    """The digest of a weight dict, as 64 hexadecimal digits.

    Args:
        weights: Arrays of any numeric dtype.

    Raises:
        ImportError: blake3 is not installed (extra `durable`).

    Example:
        >>> import numpy as np
        >>> digest({"w": np.zeros(2, np.float32)})[:16]
        '0908975e9018912d'
    """
    lines = [_line(name, weights[name]) for name in sorted(weights)]
    return blake3_of("".join(lines).encode("utf-8", "surrogatepass"))


def blake3_of(data: object) -> str:
    """BLAKE3 of some bytes, or of a contiguous array's, as 64 hexadecimal digits."""
    blake3 = _blake3()
    threads = blake3.AUTO if getattr(data, "nbytes", 0) >= SEVERAL_THREADS else 1
    return str(blake3(data, max_threads=threads).hexdigest())


def check_installed() -> None:
    """Raises if digests cannot be computed.

    Raises:
        ImportError: blake3 is not installed (extra `durable`).
    """
    _blake3()


def _line(name: str, array: Array) -> str:
    values = np.ascontiguousarray(array).reshape(array.shape)  # which makes one dimension of none
    if sys.byteorder == "big" or not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("<"))
    content = blake3_of(values.reshape(-1).view(np.uint8))
    described = [name, values.dtype.name, list(values.shape), content]
    return json.dumps(described, ensure_ascii=False, separators=(",", ":")) + "\n"


def _blake3() -> Any:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise ImportError("digests need blake3: pip install 'fed-learn[durable]'") from error
    return blake3
