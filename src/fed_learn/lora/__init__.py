"""Adapters of LoRA averaged as what they add to a model: by their products, not by their factors.

A layer with an adapter computes with `W + s·B·A`. The mean of the clients' `s·B·A` is not the product of the means of B
and A, which `weighted_average` gives. `average` gives the mean itself, or the best approximation of it.
"""

from fed_learn.lora.averaging import LayerReport, LoraAverage, average

__all__ = ["LayerReport", "LoraAverage", "average"]
