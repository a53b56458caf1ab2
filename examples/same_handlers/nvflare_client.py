"""What each site runs in NVFlare."""

import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel
from parts import SITES, Site, spoiled  # type: ignore[import-not-found] # beside this file

flare.init()
name = flare.get_site_name()
site = Site(SITES.index(name))
while flare.is_running():
    received = flare.receive()
    if received is None:
        break
    result, accuracy = site.round(received.params, received.current_round)
    if flare.is_evaluate():
        flare.send(FLModel(metrics={"accuracy": accuracy}))
        continue
    params = spoiled(result.weights, name, received.current_round)
    flare.send(FLModel(params=params, metrics={"accuracy": accuracy}, meta={"NUM_STEPS_CURRENT_ROUND": result.n_iter}))
