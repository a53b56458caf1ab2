"""Layers of Keras 2 and 3: which are built, what they derive from their variables, and what they keep beside them.

Nothing here imports either: they are there when there is a model. Variables are left to the adapters.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from typing import Any

import numpy as np

from fed_learn.errors import ModelError
from fed_learn.weights import Array


def keras2_layer() -> Any:
    """The class of the layers and models of Keras 2, for `isinstance`; an empty tuple where it has not been imported.

    Example:
        >>> isinstance(3, keras2_layer())
        False
    """
    return getattr(getattr(sys.modules.get("tf_keras"), "layers", None), "Layer", ())


def built_layers(model: Any, plain: Collection[Any]) -> list[Any]:
    """The layers of a model of Keras, none of which may still be without its variables.

    Args:
        model: The model, or a layer.
        plain: The `build` of classes that make no variables. Their layers need not have been called: an augmentation
            that only training uses.

    Raises:
        ModelError: Names the layer.
    """
    layers: list[Any] = model._flatten_layers()
    for layer in layers:
        if not layer.built and (layer is model or type(layer).build not in plain):
            raise ModelError(
                f"model: layer {layer.name!r} is not built, and may have no variables yet; "
                "call the model on a batch first, or its build(input_shape)",
                name=layer.name,
            )
    return layers


def own_variables(layer: Any) -> list[Any]:
    """The variables of a layer itself, without those of layers inside of it; of Keras 2 also what is no variable."""
    if isinstance(layer, keras2_layer()):
        return [*layer._trainable_weights, *layer._non_trainable_weights]
    return [*layer._trainable_variables, *layer._non_trainable_variables]


@contextmanager
def derived_anew(model: Any, written: Set[int], read: Callable[[Any], Array]) -> Iterator[None]:
    """Lets layers, such as Normalization, derive anew what they keep beside their variables, as after loading a file.

    Args:
        model: The model, whose variables get new values in the `with` block; or a list of variables, without layers.
        written: The ids of these variables; layers without one of them are left as they are.
        read: Gives the value of a variable.
    """
    layers = () if isinstance(model, list | tuple) else model._flatten_layers()
    deriving = [layer for layer in layers if _derives(layer) and not written.isdisjoint(map(id, own_variables(layer)))]
    kept = [variable for layer in deriving for variable in own_variables(layer) if id(variable) in written]
    before = [np.array(read(variable)) for variable in kept]
    yield
    for layer in deriving:
        layer.finalize_state()
    if all(map(np.array_equal, before, map(read, kept))):
        return
    # What was compiled before has the old values as constants. It is compiled again, which takes its time.
    for function in ("train_function", "test_function", "predict_function"):
        if getattr(model, function, None) is not None:
            setattr(model, function, None)


def _derives(layer: Any) -> bool:
    """Whether a layer does anything to finish loading; all layers of Keras 2 have a method for it."""
    own = getattr(type(layer), "finalize_state", None)
    return own is not None and own is not getattr(keras2_layer(), "finalize_state", None)


def left_in(model: Any) -> list[str]:
    """What the layers of a model keep that is in none of their variables: what it is, and of which layer."""
    return [
        f"{left} of {type(layer).__name__} {layer.name!r}"
        for layer in model._flatten_layers()
        if (left := left_of(layer))
    ]


def left_of(layer: Any) -> str:
    """What a layer keeps beside its variables and its configuration, in words; empty: nothing."""
    own = layer.__dict__
    if "lookup_table" in own:  # StringLookup, IntegerLookup; also inside of TextVectorization
        return "the vocabulary" if layer.input_vocabulary is None and int(layer.lookup_table.size()) else ""
    if "bin_boundaries" in own:  # Discretization; its summary, where it has one, is a variable in Keras 2
        adapted = own.get("summary") is not None and not own_variables(layer)
        return "the boundaries" if layer.bin_boundaries and adapted else ""
    if type(layer).__name__ == "TorchModuleWrapper":  # which makes variables of parameters alone
        buffers = [name for name, _ in layer.module.named_buffers()]
        return f"the buffers {', '.join(map(repr, buffers))}" if buffers else ""
    # Else a class of a user's own, which writes more to files than its variables.
    writes = getattr(type(layer), "save_assets", None)
    return "the assets" if writes is not None and not writes.__module__.startswith(("keras.", "tf_keras.")) else ""
