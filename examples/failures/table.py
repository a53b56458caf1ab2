"""Contributions that are not as they should be, in Flower and in NVFlare, as they are and with this library.

python examples/failures/table.py --write docs/failures.md
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import flower_failures
import nvflare_failures
from outcomes import markdown, show

STACKS = {f"Flower {version('flwr')}": flower_failures, f"NVFlare {version('nvflare')}": nvflare_failures}


def document() -> str:
    """The page of the docs."""
    parts = [
        "# What goes wrong, and what becomes of it\n",
        "Each line was run, three or more clients in one round: with the stack's own averaging, and with this\n"
        "library's drop-in for it. `python examples/failures/table.py --write docs/failures.md` wrote this page.\n",
    ]
    for stack, module in STACKS.items():
        parts += [f"## {stack}\n", markdown(stack, module.rows())]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page of the docs instead")
    file = parser.parse_args().write
    if file is not None:
        file.write_text(document(), encoding="utf-8")
        return
    for stack, module in STACKS.items():
        show(stack, module.rows())


if __name__ == "__main__":
    main()
