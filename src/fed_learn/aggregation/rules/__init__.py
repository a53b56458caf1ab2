"""Rules: how the contributions of a round become one weight dict. Each is found by its name, or given as a `Rule`."""

from fed_learn.aggregation.rules.base import Given, Rule, available, combined, failure_of, find, register
from fed_learn.aggregation.rules.clara import ClaraRule
from fed_learn.aggregation.rules.lora import LoraRule
from fed_learn.aggregation.rules.mean import MeanRule

__all__ = [
    "ClaraRule",
    "Given",
    "LoraRule",
    "MeanRule",
    "Rule",
    "available",
    "combined",
    "failure_of",
    "find",
    "register",
]
