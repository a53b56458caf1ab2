"""What stands in front of the names of variables, because a model was wrapped, and how to take it away.

Which names are expected, and what is wrong with others, is left to `fed_learn.weights`.
"""

from collections.abc import Mapping
from typing import TypeVar

from fed_learn.errors import NamesError, brief

T = TypeVar("T")

PEFT = "base_model.model."
"""What PEFT's models put before the names of a model's own modules."""
WRAPPERS = {
    "module.": "torch.nn.DataParallel",
    "_orig_mod.": "torch.compile",
    "_module.": "Opacus",
    PEFT: "PEFT",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
"""What puts a name in front of the names of a model's variables, and whose doing it is."""
WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Those of them that may stand in the middle of a name, because parts of a model can be wrapped, too."""
BESIDE = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel keeps beside the model in its `module.`: a count, and no weight of it."""


def without_prefix(weights: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Weights under the names that they have without a prefix, as wrappers, averages and checkpoints put one in front.

    `_orig_mod.` and what else wraps parts of a model too (`fed_learn.prefixes.WITHIN`) is taken away wherever it
    stands; everything else from the front of every name. The count `n_averaged` of torch's `AveragedModel`, which is
    beside the model that it wraps, is left out.

    Args:
        weights: Arrays or tensors by name; they are shared.
        prefix: What is in front, with its dot or slash: `"module."`, `"ema."`, `"base_model.model."`.

    Raises:
        NamesError: A name does not begin with it (none has it in it), or two names become one.

    Example:
        >>> without_prefix({"module.fc.weight": 1, "module.fc.bias": 2}, "module.")
        {'fc.weight': 1, 'fc.bias': 2}
        >>> without_prefix({"blocks.0._orig_mod.weight": 1}, "_orig_mod.")
        {'blocks.0.weight': 1}
    """
    averaged = prefix == "module." and BESIDE in weights
    kept = {name: value for name, value in weights.items() if not (averaged and name == BESIDE)}
    without = {name: stripped(name, prefix) for name in kept}
    same = [name for name, short in without.items() if name == short]
    if prefix in WITHIN and len(same) < len(kept):
        same = []
    if same:
        others = "" if len(same) == 1 else f" and {len(same) - 1} more"
        raise NamesError(
            f"{brief(same[0])}{others} of {len(kept)} names lacks {brief(prefix)} in front; take along only what has "
            "it, or leave the names as they are if none has",
            name=same[0],
            missing=(),
            extra=tuple(same),
        )
    found = {without[name]: value for name, value in kept.items()}
    if len(found) < len(kept):
        twice = next(name for name, short in without.items() if list(without.values()).count(short) > 1)
        raise NamesError(
            f"{brief(twice)} and another name become one without {brief(prefix)}; take along one of them",
            name=twice,
            missing=(),
            extra=(),
        )
    return found


def stripped(name: str, prefix: str) -> str:
    """One name without a prefix; see `without_prefix`.

    Example:
        >>> stripped("module.module.w", "module."), stripped("a._orig_mod.w", "_orig_mod.")
        ('module.w', 'a.w')
    """
    if prefix not in WITHIN:
        return name.removeprefix(prefix)
    return ".".join(part for part in name.split(".") if part != prefix.removesuffix("."))
