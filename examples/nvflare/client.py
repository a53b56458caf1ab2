"""What each site runs: validates the model it received, trains it, and sends it back."""

import argparse

import nvflare.client as flare
import torch
from digits import Network, accuracy, share, train  # type: ignore[import-not-found] # beside this file
from nvflare.app_common.abstract.fl_model import FLModel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nan-from", default="", help="a site that sends NaN in the second round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flare.init()
    site = flare.get_site_name()
    number = int(site.removeprefix("site-")) - 1
    x, y = share(number)
    network = Network()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        network.load_state_dict(received.params)
        metrics = {"accuracy": accuracy(network, x, y)}  # of the model as received
        if flare.is_evaluate():
            flare.send(FLModel(metrics=metrics))
            continue
        steps = train(network, x, y, seed=1000 * received.current_round + number)
        params = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        if site == options.nan_from and received.current_round == 1:
            params["hidden.weight"][0, 3] = torch.nan
        flare.send(FLModel(params=params, metrics=metrics, meta={"NUM_STEPS_CURRENT_ROUND": steps}))


if __name__ == "__main__":
    main()
