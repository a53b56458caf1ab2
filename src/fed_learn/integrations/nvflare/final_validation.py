"""`FinalValidation`: a workflow after the training, in which the clients score the final model."""

from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants, ValidateType
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fed_learn.contribution import FINAL_MODEL
from fed_learn.errors import FedLearnError, printable, text_of
from fed_learn.integrations.nvflare import props


class FinalValidation(Controller):  # type: ignore[misc] # NVFlare has no type information
    """Sends the global model of the last round to every client as a validation task, for `HandlerBridge` to score it.

    A client's metrics are of the model that it received, so training alone leaves the last model unscored. Add this to
    the job after the workflow that trains: `job.to_server(FinalValidation())`. Client scripts get the task from their
    `flare.receive()`, with `flare.is_evaluate()` true, and send an `FLModel` with metrics and no weights.

    A script that trains on whatever it receives does no harm: what it sends is left out, and one warning names all
    clients that scored nothing, and why. Its metrics are left out too: it may have measured the model that it trained.

    Args:
        task_name: Name of the task.
        timeout: Seconds after which clients that have not answered are left out; 0: wait for all.
    """

    def __init__(self, task_name: str = AppConstants.TASK_VALIDATION, timeout: int = 0) -> None:
        super().__init__()
        self.task_name = task_name
        self.timeout = timeout
        self._rounds = 0
        self._unscored: dict[str, str] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Counts the rounds of the workflow that trains."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_STARTED:
            self._rounds = fl_ctx.get_prop(AppConstants.CURRENT_ROUND) + 1

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to prepare."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Cancels tasks that have not been answered."""
        self.cancel_all_tasks(fl_ctx=fl_ctx)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Sends the model and waits for the results."""
        weights = props.global_weights(fl_ctx)
        if weights is None:
            self.system_panic(
                "there is no global model to be validated: put FinalValidation after the training", fl_ctx
            )
            return
        self._unscored = {client.name: "did not answer" for client in fl_ctx.get_engine().get_clients()}
        model = FLModel(
            params=weights,
            params_type=ParamsType.FULL,
            current_round=self._rounds,
            total_rounds=self._rounds,
            meta={"validate_type": ValidateType.MODEL_VALIDATE},
        )
        task = Task(
            name=self.task_name,
            data=FLModelUtils.to_shareable(model),
            timeout=self.timeout,
            before_task_sent_cb=self._before_sending,
            result_received_cb=self._received,
        )
        self.broadcast_and_wait(task, fl_ctx, min_responses=0, abort_signal=abort_signal)
        if self._unscored and not abort_signal.triggered:
            reasons = sorted(set(self._unscored.values()))
            names = [", ".join(sorted(n for n, why in self._unscored.items() if why == reason)) for reason in reasons]
            told = "; ".join(f"{who}: {reason}" for who, reason in zip(names, reasons, strict=True))
            self.log_warning(fl_ctx, printable(f"the final model is not scored by {told}"))

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """A result that came too late is left out."""
        self.log_warning(
            fl_ctx, printable(f"{client.name}: a result of task {task_name!r} came too late and is left out")
        )

    def _before_sending(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        self._tell(AppEventType.SEND_MODEL_FOR_VALIDATION, client_task, fl_ctx, AppConstants.MODEL_TO_VALIDATE, None)

    def _received(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        result, client_task.result = client_task.result, None
        try:
            props.scores_in(result)
        except FedLearnError as error:
            # NVFlare's own components would log an error each for an event about an answer without metrics.
            self._unscored[client_task.client.name] = text_of(error)
            return
        self._unscored.pop(client_task.client.name, None)
        event = AppEventType.VALIDATION_RESULT_RECEIVED
        self._tell(event, client_task, fl_ctx, AppConstants.VALIDATION_RESULT, result)

    def _tell(self, event: str, client_task: ClientTask, fl_ctx: FLContext, key: str, value: Any) -> None:
        """Fires an event as NVFlare's own cross-site evaluation does."""
        props.put(fl_ctx, AppConstants.MODEL_OWNER, FINAL_MODEL)
        props.put(fl_ctx, AppConstants.DATA_CLIENT, client_task.client.name)
        self.fire_event_with_data(event, fl_ctx, key, client_task.task.data if value is None else value)
