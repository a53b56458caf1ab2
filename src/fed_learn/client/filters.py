"""What a client's difference to the global model goes through before it is sent: privacy protocols, data processors."""

from collections.abc import Sequence
from typing import Any

from fed_learn.client.fed_privacy import TrainContext
from fed_learn.errors import ContributionError, FilterError, WeightsTypeError, a_type, described, text_of
from fed_learn.model_meta import FLContext
from fed_learn.numproto import model_to_weights, to_dtypes, weights_to_model
from fed_learn.ties import once, twins, under_all_names
from fed_learn.weights import Array, Schema, WeightDict


def check_filters(filters: Sequence[Any]) -> tuple[Any, ...]:
    """The filters as a tuple.

    Raises:
        TypeError: One of them has neither `apply` nor `process`, or is a class.
    """
    for one in filters:
        if isinstance(one, type) or not any(callable(getattr(one, method, None)) for method in ("apply", "process")):
            raise TypeError(f"{one!r} is no filter: pass a PrivacyProtocol or a DataProcessor, as an instance")
    return tuple(filters)


def apply_filters(
    filters: Sequence[Any], diff: WeightDict, train_ctx: TrainContext, client_ctx: FLContext, client: str
) -> dict[str, Array]:
    """What is sent in place of a difference.

    Args:
        filters: Applied in this order: `apply(model_diff, train_ctx)` of privacy protocols, else
            `process(data_ctx, app_ctx)`.
        diff: The difference. Filters get copies, which they may change: of a variable with several names (tied
            weights), which hold one array, only the first.
        train_ctx: For the privacy protocols.
        client_ctx: The client's context.
        client: Its name, for the error.

    Returns:
        A difference of the same names, shapes and dtypes; what the filters made of a variable under all its names.

    Raises:
        FilterError: A filter raised.
        ContributionError: A filter left other names or shapes, or what is no number or not finite.
    """
    tied = twins(diff)
    filtered = {name: array.copy() for name, array in once(diff, tied).items()}
    schema = Schema.of(filtered, client)
    for one in filters:
        who = f"{client}: filter {type(one).__name__}"
        try:
            left = _applied(one, filtered, train_ctx, client_ctx, schema, who)
        except ContributionError as error:
            error.contributor = client
            if not text_of(error).startswith(who):  # one that the filter itself raised
                error.args = (f"{who}: {text_of(error)}",)
            raise
        except Exception as error:
            raise FilterError(f"{who}: {described(error)}", contributor=client) from error
        filtered = left
    return under_all_names(filtered, tied, diff)


def _applied(
    one: Any, diff: dict[str, Array], train_ctx: TrainContext, client_ctx: FLContext, schema: Schema, who: str
) -> dict[str, Array]:
    if callable(getattr(one, "apply", None)):
        return to_dtypes(one.apply(diff, train_ctx), schema, who)
    data_ctx = client_ctx.clone()
    message: Any = weights_to_model(diff)
    data_ctx.set_model(message)
    left = one.process(data_ctx, client_ctx)
    if not isinstance(left, FLContext):
        raise WeightsTypeError(f"{who}: gave {a_type(type(left))}, not a context with a model")
    return model_to_weights(left.get_model(), schema, who)
