"""Handlers: objects that act on the events of a federated job."""

from fed_learn.handlers.checkpoint import CheckpointHandler
from fed_learn.handlers.early_stopping import EarlyStoppingHandler
from fed_learn.handlers.handler import Handler, fire_event
from fed_learn.handlers.json_lines import JsonLinesHandler
from fed_learn.handlers.model_selection import ModelSelectionHandler
from fed_learn.handlers.progress import ProgressHandler
from fed_learn.handlers.round_log import RoundLogHandler
from fed_learn.handlers.server_validation import ServerValidationHandler

__all__ = [
    "CheckpointHandler",
    "EarlyStoppingHandler",
    "Handler",
    "JsonLinesHandler",
    "ModelSelectionHandler",
    "ProgressHandler",
    "RoundLogHandler",
    "ServerValidationHandler",
    "fire_event",
]
