"""Compares ways of averaging a ResNet-50 over 10 clients: checks each, then runs them in turn.

    python benchmarks/weighted_average.py [repetitions]

Prints the median time of each as a multiple of a bare read of the same bytes (one thread, numpy), GB/s of input, the
peak of memory allocated beyond the inputs as Python sees it (torch's own is not among it), the dtype of the result,
and its largest error in units of the last place of float32. fed_learn and torch use all processors.
"""

import statistics
import sys
import time
import tracemalloc

from cases import SIDES, make_clients, read, resnet50_shapes, worst_error


def main(repetitions: int) -> None:
    clients, weights = make_clients(resnet50_shapes(), 10)
    size = sum(array.nbytes for client in clients for array in client.values())
    print(f"ResNet-50, {len(clients[0])} float32 tensors, 10 clients, {size / 1e9:.2f} GB read")
    sides = {"bare read (1 thread)": read, **SIDES}
    errors, peaks, dtypes = {}, {}, {}
    for name, side in sides.items():
        tracemalloc.start()
        result = side(clients, weights)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if side is not read:
            errors[name] = worst_error(result, clients, weights)
            assert errors[name] < 10, f"{name} is wrong: {errors[name]} ulp"
            dtypes[name] = str(result["fc.bias"].dtype)  # type: ignore[index]
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            started = time.perf_counter()
            side(clients, weights)
            times[name].append(time.perf_counter() - started)
    limit = statistics.median(times["bare read (1 thread)"])
    print(f"{'':22} {'× read':>7} {'GB/s':>6} {'peak MB':>8} {'dtype':>8} {'error, ulp':>11}")
    for name in sides:
        median = statistics.median(times[name])
        error, dtype = (f"{errors[name]:.3f}", dtypes[name]) if name in errors else ("–", "–")
        speed, peak = size / median / 1e9, peaks[name] / 1e6
        print(f"{name:22} {median / limit:7.2f} {speed:6.1f} {peak:8.0f} {dtype:>8} {error:>11}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
