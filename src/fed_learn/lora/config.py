"""What a configuration of PEFT says of adapters of LoRA: their ranks and scalings, and how a result's is written."""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, Self

from fed_learn.errors import ConfigError, ShapeError, a_type, brief
from fed_learn.prefixes import PEFT

FILE = "adapter_config.json"
_OF_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""How `init_lora_weights` begins where PEFT, whenever it makes the layers, also takes something from the base."""


@dataclass(frozen=True, eq=False)
class ByLayer:
    """A number of which some layers have another than the rest.

    Attributes:
        usual: That of most layers.
        others: Those of other layers, by regular expression.
        key: Finds the expression for the name of a layer; the name itself where none fits.
    """

    usual: Any
    others: Mapping[str, Any]
    key: Callable[[str], str]

    def of(self, module: str) -> Any:
        """The number of a layer."""
        return self.others.get(self.key(module.removeprefix(PEFT)), self.usual)


@dataclass(frozen=True, eq=False)
class LoraSettings:
    """The settings of one adapter.

    Attributes:
        given: What was given: a `LoraConfig`, or a dict of its fields.
        ranks: The ranks of its layers.
        alphas: Their `lora_alpha`.
        rslora: Whether products are scaled by `alpha / √rank` rather than `alpha / rank` (Kalajdzievski 2023).
        fan_in_fan_out: Whether weights of layers are stored as (inputs, outputs).
        of_the_base: `init_lora_weights`, where PEFT changes the base when it loads the configuration; else empty.
    """

    given: Any
    ranks: ByLayer
    alphas: ByLayer
    rslora: bool
    fan_in_fan_out: bool
    of_the_base: str

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
        start = fields.get("init_lora_weights")
        return cls(
            given=config,
            ranks=_by_layer(fields, "r", "rank_pattern", int),
            alphas=_by_layer(fields, "lora_alpha", "alpha_pattern", float),
            rslora=bool(fields.get("use_rslora")),
            fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
            of_the_base=start if isinstance(start, str) and start.lower().startswith(_OF_THE_BASE) else "",
        )

    def rank_of(self, module: str) -> int:
        """The rank of a layer."""
        rank: int = self.ranks.of(module)
        return rank

    def alpha_of(self, module: str) -> float:
        """The alpha of a layer."""
        alpha: float = self.alphas.of(module)
        return alpha

    def scaling_of(self, module: str) -> float:
        """By what the product of a layer is multiplied."""
        return self.alpha_of(module) / self._divisor(self.rank_of(module))

    def alpha_for(self, module: str, rank: int) -> float:
        """The alpha by which a layer keeps its scaling at another rank."""
        if rank == self.rank_of(module):
            return self.alpha_of(module)
        return self.scaling_of(module) * self._divisor(rank)

    def taken_of(self, module: str) -> tuple[object, ...]:
        """On what it depends which part of a layer's base PEFT takes as it loads an adapter; empty if it takes none."""
        if not self.of_the_base:
            return ()
        # Of these, OLoRA alone takes another part at another scaling.
        scaled = (self.scaling_of(module),) if self.of_the_base.lower() == "olora" else ()
        return (self.of_the_base, self.rank_of(module), *scaled)

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


def _by_layer(fields: Mapping[str, Any], name: str, pattern: str, kind: type[int] | type[float]) -> ByLayer:
    """A number of a configuration, together with the pattern of others.

    Raises:
        ConfigError: One of them cannot be used.
    """
    others = fields.get(pattern) or {}
    if not isinstance(others, Mapping) or not all(isinstance(key, str) for key in others):
        raise ConfigError(f"config: {pattern} must be a dict by regular expression, not {brief(others)}")
    checked = {key: _number(pattern, value, kind) for key, value in others.items()}
    return ByLayer(_number(name, fields[name], kind), checked, _finder(tuple(others)))


def _number(name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    """A positive number of a configuration, numpy's too."""
    fits = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not fits or not value > 0 or not math.isfinite(value):
        raise ConfigError(
            f"config: {name} must be a positive {kind.__name__}, not {brief(value)} ({a_type(type(value))})"
        )
    return int(value) if isinstance(value, Integral) else float(value)


@lru_cache(maxsize=100)
def _finder(keys: tuple[str, ...]) -> Callable[[str], str]:
    """What finds the expression that fits a layer, as PEFT does: whole names, or all of a name after a dot.

    Many adapters have the same expressions and the same layers, so both compiling and finding are done once.
    """
    try:
        expressions = [(key, re.compile(rf"(.*\.)?({key})$")) for key in keys]
    except re.error as error:
        raise ConfigError(f"config: {error.pattern!r} is no regular expression: {error}") from error

    @lru_cache(maxsize=10_000)
    def key_of(name: str) -> str:
        return next((key for key, expression in expressions if expression.match(name)), name)

    return key_of


def _patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the others by expressions that fit just one layer."""
    ((usual, _),) = Counter(values.values()).most_common(1)
    others = {module: value for module, value in values.items() if value != usual}
    return usual, {f"^{re.escape(module.removeprefix(PEFT))}": value for module, value in others.items()}


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha
