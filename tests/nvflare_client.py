"""The script of the clients in the jobs of `test_nvflare_jobs.py`: arithmetic instead of training, so all is known."""

import argparse

import numpy as np
from nvflare_parts import initial_weights, number_of, train


def main() -> None:
    import nvflare.client as flare
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

    parser = argparse.ArgumentParser()
    parser.add_argument("--bad", default="", help="site:round:what, or *:what")
    parser.add_argument("--careless", action="store_true", help="train on whatever comes")
    parser.add_argument("--diff", action="store_true")
    parser.add_argument("--own", default="", help="a variable that is this client's own, and that it does not receive")
    parser.add_argument("--tensors", action="store_true")
    options = parser.parse_args()
    flare.init()
    site = flare.get_site_name()
    own = {name: initial_weights()[name] for name in filter(None, [options.own])}
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        number = received.current_round
        metrics = {"accuracy": number_of(site) * (1 + number), "note": "no number"}
        if flare.is_evaluate() and not options.careless:
            flare.send(FLModel(metrics=metrics))
            continue
        if options.tensors:
            import torch

            params = {name: tensor + number_of(site) * (1 + number) for name, tensor in received.params.items()}
            assert all(isinstance(tensor, torch.Tensor) for tensor in params.values())
        else:
            assert not own.keys() & received.params.keys(), list(received.params)
            params = train({**received.params, **own}, site, number)
            own = {name: params[name] for name in own}
            if options.diff:
                params = {name: params[name] - received.params[name] for name in params}
        when, _, how = options.bad.rpartition(":")
        if when in ("*", f"{site}:{number}"):
            spoil(params, how)
        kind = ParamsType.DIFF if options.diff else ParamsType.FULL
        meta = {"NUM_STEPS_CURRENT_ROUND": 3 * number_of(site) + 1}
        flare.send(FLModel(params=params, params_type=kind, metrics=metrics, meta=meta))


def spoil(params: dict[str, np.ndarray], how: str) -> None:
    if how == "nan":
        params["w"][1, 2] = np.nan
    elif how == "shape":
        params["half"] = params["half"][:1]
    else:
        raise ValueError(how)


if __name__ == "__main__":
    main()
