"""Federated training on digits with NVFlare, our aggregator and our handlers, in its simulator or its processes.

    python examples/nvflare/job.py
    python examples/nvflare/job.py --nan-from site-3
    python examples/nvflare/job.py --poc

Three clients train a small network. The server averages what passes the checks, scores each average on data of its own,
has the clients score what they receive, the last model included, and keeps the best model. Prints a row per round.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from digits import CLIENTS, DigitsEvaluator, Network  # type: ignore[import-not-found] # beside this file
from nvflare.app_opt.pt.recipes import FedAvgRecipe
from nvflare.recipe import PocEnv, SimEnv

import fed_learn as fl
from fed_learn.handlers import JsonLinesHandler
from fed_learn.integrations.nvflare import WeightedAverageAggregator, add_handlers

HERE = Path(__file__).parent


def make_recipe(num_rounds: int, report: Path, nan_from: str, stock: bool) -> FedAvgRecipe:
    recipe = FedAvgRecipe(
        name="digits",
        model=Network(),
        min_clients=CLIENTS,
        num_rounds=num_rounds,
        train_script=str(HERE / "client.py"),
        train_args=f"--nan-from={nan_from}",
        aggregator=None if stock else WeightedAverageAggregator(min_contributions=2),
        key_metric="accuracy" if stock else "",  # otherwise the handlers select the best model
    )
    if stock:
        return recipe
    handlers = [
        fl.ModelSelectionHandler(),
        fl.ServerValidationHandler(DigitsEvaluator(), num_rounds_per_valid=1),
        JsonLinesHandler(str(report)),
    ]
    add_handlers(recipe, handlers)
    return recipe


def show(report: Path) -> None:
    for line in map(json.loads, report.read_text(encoding="utf-8").splitlines()):
        if line["type"] == "round":
            scores = "  ".join(f"{name} {value:.4f}" for name, value in line["metrics"].items())
            refused = "".join(f"; refused: {r['message']}" for r in line["rejected"])
            print(f"round {line['round'] + 1}: {', '.join(line['accepted'])}  {scores}{refused}")
        else:
            print(f"{line['model']} model on {line['contributor']}: accuracy {line['metrics']['accuracy']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nan-from", default="", help="a site that sends NaN in round 1")
    parser.add_argument("--stock", action="store_true", help="NVFlare's own averaging and model selection instead")
    parser.add_argument("--poc", action="store_true", help="in proof-of-concept mode: real servers and clients")
    parser.add_argument("--workspace", type=Path, default=Path(tempfile.gettempdir()) / "fed_learn-nvflare")
    options = parser.parse_args()
    workspace = options.workspace.resolve()
    report = workspace / "report.jsonl"
    os.environ.setdefault("NVFLARE_POC_WORKSPACE", str(workspace / "poc"))
    os.chdir(HERE)  # the client's script and its modules are found from here
    recipe = make_recipe(options.rounds, report, options.nan_from, options.stock)
    env = PocEnv(num_clients=CLIENTS) if options.poc else SimEnv(num_clients=CLIENTS, workspace_root=str(workspace))
    result = recipe.run(env).get_result(clean_up=False)
    if not options.stock:
        show(report)
    (best,) = Path(result).rglob("best_FL_global_model.pt")
    kept = workspace / best.name
    shutil.copyfile(best, kept)
    print(f"best model: {kept}")


if __name__ == "__main__":
    main()
