"""How a job grows with its clients: time of rounds and of the end, and memory, each in a process of its own.

    pytest benchmarks/test_many_clients.py -s

A tiny model, so that what is measured is bookkeeping. Rounds have to be linear in the number of clients, and so has the
end where nobody asks for the matrix of every client's model on every client's data.
"""

import json
import subprocess
import sys

import pytest

ONE = """
import json, resource, sys, time
import numpy as np
import fed_learn as fl

count, cross_site = int(sys.argv[1]), json.loads(sys.argv[2])

class Learner(fl.Learner):
    def train(self, weights, ctx):
        return {"w": weights["w"] + 1}, 1

    def validate(self, weights, ctx):
        return 0.5

class Clock(fl.Handler):
    def end_round(self, ctx):
        self.rounds_over = time.perf_counter()

clock = Clock()
clients = [fl.FederatedClient(f"site-{i:05d}", Learner()) for i in range(count)]
server = fl.FederatedServer({"w": np.zeros(10)}, num_rounds=3, handlers=[fl.ModelSelectionHandler(), clock])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
server.run(clients, max_workers=1, cross_site=cross_site)
ended = time.perf_counter()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(clock.rounds_over - started) / 3, ended - clock.rounds_over, (after - before) / 1024]))
"""


def job(count: int, cross_site: bool) -> tuple[float, float, float]:
    """Seconds of a round, seconds of the end, MiB more than before."""
    command = [sys.executable, "-c", ONE, str(count), json.dumps(cross_site)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    round_seconds, end, memory = json.loads(done.stdout)
    return round_seconds, end, memory


@pytest.mark.parametrize("counts", [(10, 100, 1000, 5000)], ids=["without the matrix"])
def test_rounds_and_the_end_are_linear_in_the_number_of_clients(counts: tuple[int, ...]) -> None:
    print("\nclients    a round ms   the end ms   per client us   memory MiB")
    found = {count: job(count, cross_site=False) for count in counts}
    for count, (round_seconds, end, memory) in found.items():
        each = (round_seconds + end) / count
        print(f"{count:>7}{round_seconds * 1e3:>14.1f}{end * 1e3:>13.1f}{each * 1e6:>16.1f}{memory:>13.1f}")
    largest, smaller = counts[-1], counts[-2]
    ratio = largest / smaller
    assert found[largest][0] < 1.5 * ratio * found[smaller][0]
    assert found[largest][1] < 1.5 * ratio * found[smaller][1]


def test_the_matrix_is_quadratic_and_no_more() -> None:
    print("\nclients    the end with the matrix s   per validation us")
    found = {count: job(count, cross_site=True)[1] for count in (100, 200, 400)}
    for count, end in found.items():
        print(f"{count:>7}{end:>29.2f}{end / count**2 * 1e6:>20.1f}")
    assert found[400] < 1.5 * 4 * found[200]
