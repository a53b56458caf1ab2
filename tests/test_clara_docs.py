"""The page on Clara Train: its imports exist, its code runs and gives what it says."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "clara.md").read_text(encoding="utf-8")


def test_every_import_of_the_table_exists() -> None:
    cells = re.findall(r"^\| (`fed_learn\S+`[^|]*) \|", PAGE, re.MULTILINE)
    assert len(cells) == 10
    for cell in cells:
        path, *names = re.findall(r"`([\w.]+)`", cell)
        if not names:
            path, _, name = path.rpartition(".")
            names = [name]
        module = importlib.import_module(path)
        assert all(isinstance(getattr(module, name), type) or callable(getattr(module, name)) for name in names)


def test_the_job_in_code_gives_what_it_says() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code = "\n".join(line.removeprefix("   ") for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers = [float(number) for number in re.findall(r"\d[\d.]*", done.stdout)]
    assert numbers == pytest.approx([3.0] * 4, abs=0.05)
    assert done.stderr == ""


def test_the_configuration_of_the_page_is_one() -> None:
    (diff,) = (block for block in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL) if '"servers"' in block)
    text = "\n".join(line[4:] for line in diff.splitlines())
    text = text.replace("2.0}},\n", "2.0}},\n")
    config = json.loads(text)
    assert set(config) == {"servers", "aggregator", "client"}
