"""A whole job with clients in this process: rounds, the final model, the cross-site validation."""

import logging
from typing import Any

from fed_learn.aggregation.tensors import without_tensors
from fed_learn.client.fed_client import FederatedClient
from fed_learn.contribution import FINAL_MODEL, GLOBAL_BEST
from fed_learn.errors import ClientQuitError, StateError, as_failure, is_error, text_of
from fed_learn.server.client_pool import ClientPool
from fed_learn.server.job import Job
from fed_learn.weights import FrozenWeights, as_weight_dict, check_finite

logger = logging.getLogger(__name__)


def run_job(job: Job, clients: ClientPool, cross_site: bool | str = True) -> None:
    """Runs a job that has begun, or goes on, up to the last CLIENT_QUIT; `FederatedServer.run` says more.

    Raises:
        ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
        HandlerError: A handler raised, with `on_handler_error="raise"`.
        TooFewContributionsError: Too few clients are left for another round.
        StateError: A client is not as it was when its state was kept.
        NothingAggregatedError: No round made a new global model.
    """
    _register(job, clients, keep_best=cross_site is True)
    job.states_of_clients = clients.states
    if not job.resumed:
        job.save()  # once more, with the clients as they begin
    for number in range(job.next_round, job.settings.num_rounds or 1):
        if job.stopped:
            break
        _run_round(job, clients, number)
    _score_final_model(job, clients, cross_site)
    try:
        job.finish()
    finally:
        for name in clients:
            job.quit(name)
            job.record(clients.dismiss(name))


def _register(job: Job, clients: ClientPool, keep_best: bool) -> None:
    for name in {failure.contributor for failure in job.quits} & set(clients):
        logger.warning("%s left the job before it was resumed, and stays out", name)
        clients.leave_out(name)
    for name in [name for name in job.clients if name not in set(clients)]:
        job.quit(name, ClientQuitError(f"{name}: was not given when the job was resumed", contributor=name))

    def start(client: FederatedClient) -> None:
        client.is_not_sent, client.keeps_best = job.is_not_sent, keep_best
        client.start(job.settings.num_rounds or 1)
        client.set_state(job.kept_of_clients.get(client.name))

    for name, answer in clients.ask(start):
        if isinstance(answer, StateError):  # the mistake of whoever resumes the job, not the client's failure
            raise answer
        if is_error(answer):
            job.note_failure(name, as_failure(answer), "could not start")
            job.record(clients.dismiss(name))
        else:
            job.register(name)
    job.check_enough_clients()


def _run_round(job: Job, clients: ClientPool, number: int) -> None:
    job.start_round(number)
    weights = job.sent()
    for name in clients:
        job.send_model(name)
    few = job.settings.aggregation.stream  # which is added up, and not held
    for name, answer in clients.ask(lambda client: client.train_round(number, lambda: weights), few=few):
        # A client sends one contribution; whatever a faulty one sends besides is received too, and refused.
        given: Any = answer
        sent = list(given) if type(given) in (list, tuple) else [given] if given is not None else []
        if not sent:
            job.absent(name)
        for contribution in sent:
            job.receive(name, contribution)
        _stop_if_it_left(job, clients, name)
    job.aggregate()
    job.end_round()
    job.check_enough_clients()


def _stop_if_it_left(job: Job, clients: ClientPool, name: str) -> None:
    if name not in job.clients:
        job.record(clients.dismiss(name))


def _score_final_model(job: Job, clients: ClientPool, cross_site: bool | str) -> None:
    """The clients score the final model, then each other's best and the job's best."""
    # Clients offer their local bests first: they are asked for before anything is validated.
    job.begin_validation(FINAL_MODEL)
    models = _local_bests(job, clients) if cross_site is True else {}
    for name in clients:
        job.send_model(name)
    _validate_everywhere(job, clients, FINAL_MODEL, job.weights)
    best = job.ctx.best_model if cross_site else None
    if best is not None:
        models[GLOBAL_BEST] = best.weights
    for model, weights in models.items():
        job.begin_validation(model, weights)
        _validate_everywhere(job, clients, model, weights)


def _local_bests(job: Job, clients: ClientPool) -> dict[str, FrozenWeights]:
    bests: dict[str, FrozenWeights] = {}
    for name, answer in clients.ask(lambda client: client.submit_best_model()):
        if is_error(answer):
            job.quit(name, as_failure(answer))
            _stop_if_it_left(job, clients, name)
        elif answer is not None:
            given: Any = answer
            try:
                offered = {n: value for n, value in given.items() if not job.is_local(n)}
                weights = as_weight_dict(without_tensors(offered, name), name)
                fit, _ = job.schema.fit(weights, name)
                frozen = FrozenWeights({**job.weights, **fit})  # what is checked below is what is kept
                check_finite(frozen, name, constants=job.weights)
            except BaseException as error:  # noqa: BLE001 - whatever a client offers must not end the job
                reason = text_of(as_failure(error))
                logger.error("the best model of %s is left out of the cross-site validation: %s", name, reason)
            else:
                bests[name] = frozen
    return bests


def _validate_everywhere(job: Job, clients: ClientPool, model: str, weights: FrozenWeights) -> None:
    sent = job.sent(weights)
    for name, answer in clients.ask(lambda client: client.validate_model(model, sent)):
        job.receive_validation_result(name, answer)
        _stop_if_it_left(job, clients, name)
