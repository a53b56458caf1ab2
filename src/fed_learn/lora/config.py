"""What a configuration of PEFT says of adapters of LoRA: their ranks and scalings, and how a result's is written."""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

from fed_learn.errors import ConfigError, ShapeError, a_type, brief

WRAPPER = "base_model.model."
"""What PEFT's models put before the names of a model's own modules."""
FILE = "adapter_config.json"


@dataclass(frozen=True, eq=False)
class LoraSettings:
    """The settings of one adapter.

    Attributes:
        given: What was given: a `LoraConfig`, or a dict of its fields.
        rank: The rank of its layers.
        alpha: `lora_alpha`.
        rslora: Whether products are scaled by `alpha / √rank` rather than `alpha / rank` (Kalajdzievski 2023).
        rank_pattern: Other ranks of layers, by regular expression.
        alpha_pattern: Other alphas of layers, by regular expression.
        fan_in_fan_out: Whether weights of layers are stored as (inputs, outputs).
    """

    given: Any
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool

    @classmethod
    def of(cls, given: Any) -> Self:
        """Reads a `peft.LoraConfig`, a dict of its fields, or the path of an `adapter_config.json` or of its folder.

        Raises:
            ConfigError: It is none, is of another method than LoRA, or holds a value that none can have.
            OSError: The file cannot be read.
        """
        config = _read(Path(given)) if isinstance(given, str | PathLike) else given
        fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        missing = [name for name in ("r", "lora_alpha") if name not in fields]
        if missing:
            raise ConfigError(
                f"config: {brief(given)} has no {missing[0]!r}: pass a peft.LoraConfig (of a model: "
                "model.peft_config['default']), a dict of its fields, or the path of an adapter_config.json"
            )
        method = str(getattr(fields.get("peft_type"), "value", fields.get("peft_type") or "LORA"))
        if method.upper() != "LORA":
            raise ConfigError(f"config: is of {method}, and only adapters of LoRA are averaged")
        ranks, alphas = (fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
        for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
                raise ConfigError(f"config: {name} must be a dict by regular expression, not {brief(pattern)}")
        return cls(
            given=config,
            rank=_number("r", fields["r"], int),
            alpha=_number("lora_alpha", fields["lora_alpha"], float),
            rslora=bool(fields.get("use_rslora")),
            rank_pattern={key: _number("rank_pattern", rank, int) for key, rank in ranks.items()},
            alpha_pattern={key: _number("alpha_pattern", alpha, float) for key, alpha in alphas.items()},
            fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
        )

    def rank_of(self, module: str) -> int:
        """The rank of a layer."""
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a layer."""
        return self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha)

    def scaling_of(self, module: str) -> float:
        """By what the product of a layer is multiplied."""
        return self.alpha_of(module) / self._divisor(self.rank_of(module))

    def alpha_for(self, module: str, rank: int) -> float:
        """The alpha by which a layer keeps its scaling at another rank."""
        if rank == self.rank_of(module):
            return self.alpha_of(module)
        return self.scaling_of(module) * self._divisor(rank)

    def check_rank(self, module: str, found: int, name: str, who: str) -> None:
        """Refuses a factor of another rank than these settings say.

        Raises:
            ShapeError: It is; names the factor.
        """
        expected = self.rank_of(module)
        if found != expected:
            raise ShapeError(
                f"{who}: {name!r} has rank {found}, and its config says {expected}: pass the config of this adapter "
                "(config= takes one for each); adapters of experts, several in one variable, are not averaged",
                contributor=who,
                name=name,
                shape=(found,),
                expected=(expected,),
            )

    def with_layers(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Any:
        """The configuration of adapters of other ranks and alphas, of the kind that was given.

        Args:
            ranks: By layer.
            alphas: By layer.
        """
        same = all(
            self.rank_of(module) == rank and self.alpha_of(module) == alphas[module] for module, rank in ranks.items()
        )
        if same:
            return self.given
        rank, rank_pattern = _patterns(ranks)
        alpha, alpha_pattern = _patterns({module: _plain(alpha) for module, alpha in alphas.items()})
        changes = {"r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
        if isinstance(self.given, Mapping):
            return {**self.given, **changes}
        made = copy.copy(self.given)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rslora else rank


def _read(path: Path) -> Any:
    path = path / FILE if path.is_dir() else path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"config: {str(path)!r} is no JSON file: {error}") from error


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    """A positive number of a configuration."""
    fits = isinstance(value, int | (float if kind is float else int)) and not isinstance(value, bool)
    if not fits or not value > 0 or not math.isfinite(value):
        raise ConfigError(
            f"config: {name} must be a positive {kind.__name__}, not {brief(value)} ({a_type(type(value))})"
        )
    return value


def _key(pattern: Mapping[str, object], module: str) -> str:
    """The expression of a pattern that fits a layer, as PEFT finds it: whole names, of whatever is after a dot."""
    name = module.removeprefix(WRAPPER)
    try:
        return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), name)
    except re.error as error:
        raise ConfigError(f"config: {error.pattern!r} is no regular expression: {error}") from error


def _patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the others by expressions that fit just one layer."""
    ((usual, _),) = Counter(values.values()).most_common(1)
    others = {module: value for module, value in values.items() if value != usual}
    return usual, {f"^{re.escape(module.removeprefix(WRAPPER))}": value for module, value in others.items()}


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha
