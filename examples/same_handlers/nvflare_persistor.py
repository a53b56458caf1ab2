"""Where NVFlare's server gets the first model from."""

from typing import Any

from nvflare.app_common.abstract.model import ModelLearnable, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from parts import demo  # type: ignore[import-not-found] # beside this file


class DemosModel(ModelPersistor):  # type: ignore[misc] # NVFlare has no type information
    """The demo's first model; keeps none, since a handler tells what became of it."""

    def load_model(self, fl_ctx: Any) -> ModelLearnable:
        weights = {name: array.copy() for name, array in demo().server.weights.items()}
        return make_model_learnable(weights=weights, meta_props={})

    def save_model(self, model: ModelLearnable, fl_ctx: Any) -> None:
        """Nothing to keep."""
