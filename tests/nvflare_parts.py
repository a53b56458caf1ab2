"""What the jobs of `test_nvflare_jobs.py` are made of; NVFlare's server and clients import this module by its name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor

import fed_learn as fl


def initial_weights() -> dict[str, np.ndarray]:
    return {
        "w": np.arange(12, dtype=np.float32).reshape(4, 3) / 7,
        "half": np.linspace(-1, 1, 5).astype(np.float16),
        "count": np.array(1000, np.int64),
    }


def number_of(site: str) -> int:
    return int(site.removeprefix("site-"))


def train(weights: dict[str, Any], site: str, number: int) -> dict[str, np.ndarray]:
    """What a client makes of the weights that it received in a round."""
    rng = np.random.default_rng([number_of(site), number])
    return {
        "w": weights["w"] + rng.standard_normal(weights["w"].shape, np.float32),
        "half": weights["half"] + rng.standard_normal(5, np.float32).astype(np.float16),
        "count": np.array(weights["count"] + 10 * number_of(site) + number, np.int64),
    }


class Persistor(ModelPersistor):  # type: ignore[misc] # NVFlare has no type information
    """Starts a job with `initial_weights`, as arrays or tensors, and keeps each global model in a file."""

    def __init__(self, folder: str, tensors: bool = False) -> None:
        super().__init__()
        self.folder = folder
        self.tensors = tensors
        self._count = 0

    def load_model(self, fl_ctx: Any) -> ModelLearnable:
        weights: dict[str, Any] = initial_weights()
        if self.tensors:
            import torch
            from nvflare.app_opt.pt.decomposers import TensorDecomposer
            from nvflare.fuel.utils import fobs

            fobs.register(TensorDecomposer)
            weights = {
                "w": torch.from_numpy(weights["w"]),
                "half": torch.from_numpy(weights["half"]),
                "brain": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
                "large": torch.zeros(1024, 600),
                "count": torch.tensor(1000),
            }
        return make_model_learnable(weights=weights, meta_props={})

    def save_model(self, model: ModelLearnable, fl_ctx: Any) -> None:
        weights = model[ModelLearnableKey.WEIGHTS]
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        if self.tensors:
            import torch

            torch.save(weights, Path(self.folder) / f"{self._count}.pt")
        else:
            np.savez(Path(self.folder) / f"{self._count}.npz", **weights)
        self._count += 1


class Recorder(fl.Handler):
    """Writes each event, with what matters of its context, as a line of JSON."""

    def __init__(self, path: str) -> None:
        self.path = path

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        contribution, refusal = ctx.get_prop(fl.ContextKey.CONTRIBUTION), ctx.get_prop(fl.ContextKey.REJECTION)
        report, best = ctx.get_prop(fl.ContextKey.REPORT), ctx.best_model
        weights = None if ctx.model is None else ctx.model.weights
        line = {
            "event": str(event),
            "round": ctx.get_prop(fl.ContextKey.ROUND),
            "num_rounds": ctx.get_prop(fl.ContextKey.NUM_ROUNDS),
            "contributor": ctx.get_prop(fl.ContextKey.CONTRIBUTOR),
            "contribution": contribution and [contribution.contributor, contribution.n_iter],
            "contributions": [c.contributor for c in ctx.get_prop(fl.ContextKey.CONTRIBUTIONS, ())],
            "refusal": refusal and f"{type(refusal).__name__}: {refusal}",
            "report": report and report.as_dict(),
            "best": best and [best.round, best.metric],
            "w": None if weights is None else np.asarray(weights["w"], float).ravel().tolist(),
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Raiser(fl.Handler):
    """Raises at an event of a round."""

    def __init__(self, event: str, number: int) -> None:
        self.event = event
        self.number = number

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        if event == self.event and ctx.get_prop(fl.ContextKey.ROUND) == self.number:
            raise RuntimeError(f"on purpose, in round {self.number}")


class Chooser(fl.Handler):
    """Takes a client's contribution out in a round, and sets the new global model to ones in another."""

    def __init__(self, site: str, number: int, ones: int) -> None:
        self.site = site
        self.number = number
        self.ones = ones

    def before_aggregation(self, ctx: fl.FLContext) -> None:
        if ctx[fl.ContextKey.ROUND] == self.number:
            contributions = ctx[fl.ContextKey.CONTRIBUTIONS]
            ctx[fl.ContextKey.CONTRIBUTIONS] = tuple(c for c in contributions if c.contributor != self.site)

    def end_round(self, ctx: fl.FLContext) -> None:
        if ctx[fl.ContextKey.ROUND] == self.ones:
            assert ctx.model is not None
            assert ctx.model.weights is not None
            ctx.set_model(fl.ModelData({name: np.ones_like(array) for name, array in ctx.model.weights.items()}))
