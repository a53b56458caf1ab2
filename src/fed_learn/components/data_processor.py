"""`DataProcessor`, a step that what a client contributes goes through before it is sent (Clara Train's name)."""

from abc import ABC, abstractmethod

from fed_learn.model_meta import FLContext


class DataProcessor(ABC):
    """Changes the model on its way out of a client; one of `FederatedClient(filters=)`.

    Example:
        >>> import numpy as np
        >>> from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray, weights_to_model
        >>> class Halve(DataProcessor):
        ...     def process(self, data_ctx, app_ctx):
        ...         for message in data_ctx.model.params.values():
        ...             message.CopyFrom(ndarray_to_proto(proto_to_ndarray(message) / 2))
        ...         return data_ctx
        >>> sent = Halve().process(FLContext(model=weights_to_model({"w": np.ones(2)})), FLContext())
        >>> proto_to_ndarray(sent.model.params["w"])
        array([0.5, 0.5])
    """

    @abstractmethod
    def process(self, data_ctx: FLContext, app_ctx: FLContext) -> FLContext:
        """Processes the model in `data_ctx`.

        Args:
            data_ctx: A context whose `model` is a `fed_learn.protos.federated_pb2.ModelData` with what is to be sent:
                the difference to the global model. Change it, or set another.
            app_ctx: The client's context.

        Returns:
            `data_ctx`, or another context with a model.
        """
