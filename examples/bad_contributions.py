"""What happens to bad contributions: one of five clients sends each kind in round 3.

    python examples/bad_contributions.py

Each is refused with its cause, and all later rounds have the very bytes of a job in which that client sent nothing in
round 3 (or, for the second contribution of a client, only the first one).
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import fed_learn as fl
from fed_learn.simulation import Demo, build_demo

CULPRIT, ROUND, ROUNDS = "site-3", 2, 5
Spoil = Callable[[fl.Contribution], Any]


class Spoiler(fl.FederatedClient):
    """Sends what `spoil` makes of its contribution to round 3."""

    spoil: Spoil

    def train_round(self, number: int, request_model: Callable[[], Any]) -> Any:
        contribution = super().train_round(number, request_model)
        return self.spoil(contribution) if number == ROUND and contribution is not None else contribution


def weights_with(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Changes a copy of the weights."""

    def spoil(contribution: fl.Contribution) -> fl.Contribution:
        weights = {name: array.copy() for name, array in (contribution.weights or {}).items()}
        change(weights)
        return replace(contribution, weights=weights)

    return spoil


def recast(dtype: Any) -> Spoil:
    return weights_with(lambda w: w.update({"hidden.bias": w["hidden.bias"].astype(dtype)}))


def poke(value: float) -> Spoil:
    return weights_with(lambda w: w["output.weight"].__setitem__((3, 1), value))


def counting(weight: Any) -> Spoil:
    return lambda c: replace(c, aggregation_weight=weight)


CASES: dict[str, Spoil] = {
    "a variable is missing": weights_with(lambda w: w.pop("output.bias")),
    "a variable is extra": weights_with(lambda w: w.update(extra=np.zeros(3, np.float32))),
    "a variable has another name": weights_with(lambda w: w.update(bias=w.pop("output.bias"))),
    "a shape that would broadcast": weights_with(lambda w: w.update({"hidden.bias": np.zeros(1, np.float32)})),
    "a transposed matrix": weights_with(lambda w: w.update({"output.weight": w["output.weight"].T})),
    "integers": recast(np.int64),
    "bool": recast(bool),
    "complex numbers": recast(np.complex64),
    "an object array": recast(object),
    "strings": recast(str),
    "a list, no array": weights_with(lambda w: w.update({"hidden.bias": w["hidden.bias"].tolist()})),
    "one NaN": poke(np.nan),
    "one infinity": poke(-np.inf),
    "no weights at all": lambda c: replace(c, weights=None),
    "no aggregation weight": counting(None),
    "a negative aggregation weight": counting(-1.0),
    "an aggregation weight that is no number": counting("many"),
    "a NaN aggregation weight": counting(np.nan),
    "an infinite aggregation weight": counting(np.inf),
    "a contribution of the round before": lambda c: replace(c, round=ROUND - 1),
    "a difference, not full weights": lambda c: replace(c, kind=fl.Kind.DIFF),
    "another client's name": lambda c: replace(c, contributor="site-1"),
    "no contribution but a dict": lambda c: dict(c.weights or {}),
    "a second contribution": lambda c: [c, replace(c, aggregation_weight=1000)],
}


class Fingerprints(fl.Handler):
    """Keeps a hash of the global model after each round."""

    def __init__(self) -> None:
        self.hashes: list[str] = []

    def end_round(self, ctx: fl.FLContext) -> None:
        assert ctx.model is not None and ctx.model.weights is not None
        data = b"".join(array.tobytes() for array in ctx.model.weights.values())
        self.hashes.append(hashlib.sha256(data).hexdigest())


def run(spoil: Spoil) -> tuple[fl.JobResult, list[str]]:
    """The job in which one client sends what `spoil` returns; its result, and the models' hashes."""
    fingerprints = Fingerprints()
    demo = build_demo(
        num_clients=5,
        num_rounds=ROUNDS,
        local_epochs=1,
        seed=1,
        reporters=[fingerprints],
        on_bad_contribution="reject",
        min_contributions=3,
    )
    clients = []
    for client in demo.clients:
        if client.name == CULPRIT:
            client = Spoiler(client.name, client.learner)
            client.spoil = spoil
        clients.append(client)
    return Demo(demo.server, tuple(clients), demo.split).run(), fingerprints.hashes


def main() -> None:
    _, honest = run(lambda c: c)
    _, absent = run(lambda c: None)
    assert honest[:ROUND] == absent[:ROUND] and honest[ROUND] != absent[ROUND]
    table = Table(title=f"{CULPRIT} of five clients sends it in round {ROUND + 1} of {ROUNDS}", box=None)
    for column in ("sent", "refused as", "message", "all rounds byte-identical"):
        table.add_column(column, overflow="fold")
    failures = 0
    for name, spoil in CASES.items():
        result, hashes = run(spoil)
        (rejected,) = result.reports[ROUND].rejected
        same = hashes == (honest if name == "a second contribution" else absent)
        failures += not same or rejected.contributor != CULPRIT
        table.add_row(name, rejected.cause, str(rejected.error), "yes" if same else "NO")
    Console(width=170).print(table)
    print(f"{len(CASES)} kinds, {failures} failures")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
