"""What is refused of adapters before they are averaged: several in one dict, unlike ones, and other parts of a base."""

from collections.abc import Sequence

from fed_learn.aggregation.batch import Checked
from fed_learn.aggregation.low_rank import Layer, layers_in
from fed_learn.errors import ConfigError, DtypeError, NamesError
from fed_learn.lora.config import LoraSettings
from fed_learn.weights import Schema, native_dtype, same_sort


def check_single(layers: list[Layer], who: str) -> None:
    """Refuses several adapters in one weight dict: each has a configuration and a report of its own.

    Raises:
        NamesError: A layer has several.
    """
    seen: dict[str, Layer] = {}
    for layer in layers:
        other = seen.setdefault(layer.module, layer)
        if other is not layer:
            raise NamesError(
                f"{who}: {layer.module!r} has several adapters ({other.a!r}, {layer.a!r}): average one at a "
                "time, as peft.get_peft_model_state_dict(model, adapter_name=...) or only='default' gives it",
                contributor=who,
                name=layer.a,
            )


def check_alike(row: Checked, own: LoraSettings | None, layers: list[Layer], schema: Schema) -> None:
    """Refuses an adapter of other variables, or other shapes but for ranks, than the first one, or than its config.

    Raises:
        NamesError, ShapeError, DtypeError: It is; names the variable.
    """
    who, arrays = row.contributor, row.arrays
    if arrays.keys() != schema.keys():
        raise schema.names_error(arrays, who)
    layers_in(Schema.of(arrays), who)  # whose factors have products
    expected = Schema(schema)
    for layer in layers:
        rank = arrays[layer.a].shape[0]
        (a, a_dtype), (b, b_dtype) = schema[layer.a], schema[layer.b]
        expected[layer.a], expected[layer.b] = ((rank, *a[1:]), a_dtype), ((b[0], rank, *b[2:]), b_dtype)
        if own is not None:
            own.check_rank(layer.module, rank, layer.a, who)
    for name, array in arrays.items():
        dtype = expected[name][1]
        if same_sort(array.dtype, dtype) and native_dtype(array.dtype) != dtype:
            raise DtypeError(
                f"{who}: {name!r} has dtype {array.dtype}, expected {dtype}: cast all adapters to one dtype (astype of "
                "arrays, .to of tensors)",
                contributor=who,
                name=name,
                dtype=array.dtype,
                expected=dtype,
            )
    expected.check(arrays, who)


def check_bases(settings: Sequence[LoraSettings | None], module: str, rank: int, made: int, *, residual: bool) -> None:
    """Refuses a result that PEFT would load beside another base than the adapters have been trained with.

    PiSSA, OLoRA, CorDA and LoftQ take a part out of the base, which depends on the rank, and do so again at loading.

    Args:
        settings: Of the adapters.
        module: The layer.
        rank: That of the first adapter.
        made: That of the result.
        residual: Whether something is added to the base.

    Raises:
        ConfigError: It would; says why.
    """
    taken = [() if own is None else own.taken_of(module) for own in settings]
    starts = dict.fromkeys(repr(own.of_the_base) for own in settings if own is not None and own.of_the_base)
    if not starts:
        return
    if len({*taken}) > 1:
        problem = "not the same part for all adapters"
    elif residual:
        problem = "another part once a residual is in the base"
    elif made != rank:
        problem = f"another part at rank {made} of the result than at rank {rank}"
    else:
        return
    raise ConfigError(
        f"config: with init_lora_weights={' or '.join(starts)} PEFT takes a part out of the base of {module!r} when "
        f"it loads an adapter, and {problem}: convert adapters to plain LoRA first (model.save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...) writes them and their config), or keep one rank (method='svd')"
    )
