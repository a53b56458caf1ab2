"""Proves on one machine, in a few minutes and without network, what this library says of GPUs: bits, counts, times.

    python benchmarks/cuda.py --make-wheels DIR                 where there is a network
    python benchmarks/cuda.py --wheels DIR --json result.json   where there is a GPU

It runs the tests of devices; compares the torch kernel with the native one, byte by byte, by plain operations and by
the fused ones; counts launches and waits; and times both against a copy on the device. The last line says "passed", or
"failed" and why, and the exit code is 0 or 1. Without a GPU it takes tensors on the CPU and a pretended device, and
Triton's interpreter for the fused operations; it measures no times then, and says so. What it needs: torch, numpy,
pytest, hypothesis, ml_dtypes; triton for the fused operations; and fed_learn, installed or from `--wheels`.

Its steps are in `cuda_parts`.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    arguments = _parsed()
    # Not the folder of this file: its name is that of a package which torch looks for.
    sys.path[0] = str(ROOT)
    from benchmarks.cuda_parts import wheels

    if arguments.make_wheels:
        wheels.make(arguments.make_wheels)
        return 0
    with ExitStack() as stack:
        if arguments.wheels:
            target = stack.enter_context(tempfile.TemporaryDirectory())
            wheels.install(arguments.wheels.resolve(), Path(target))
        # Only now: these import fed_learn, and what the tests have to share.
        sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "cuda")]
        from benchmarks.cuda_parts.steps import run

        return run(arguments.seconds, quick=arguments.quick, json_file=arguments.json)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--make-wheels", type=Path, metavar="DIR", help="make the wheels for --wheels, and do no more")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="use these wheels, not the fed_learn that is there")
    parser.add_argument("--seconds", type=float, default=420, help="how long all may take (default: 420)")
    parser.add_argument("--quick", action="store_true", help="small inputs and few tests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to a file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
