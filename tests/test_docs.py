"""The pages of the docs: every event has its row, links lead somewhere, and the code runs."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import fed_learn as fl

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "README.md").read_text(encoding="utf-8")


def printed_by(code: str, page: str) -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {})
    return printed.getvalue().splitlines()


def test_the_table_of_moments_has_every_event_in_every_stack() -> None:
    rows = re.findall(r"^\| ([A-Z_]+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == [event.name for event in fl.EventType]
    assert all(len(cells.split(" | ")) == 3 for _, cells in rows)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_and_paths_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert all((DOCS / target).exists() for target in targets)
    named = re.findall(r"`((?:examples|benchmarks|tests)/[\w/.]+)`", text)
    assert all((DOCS.parent / path).exists() for path in named)


def test_the_loop_of_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert printed_by(code, "docs/README.md") == ["('site-1', 'site-2') [1. 1.]", "('site-1', 'site-2') [1.5 1.5]"]


def test_the_code_on_gpus_runs_with_and_without_one() -> None:
    torch = pytest.importorskip("torch")
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "gpu.md").read_text(encoding="utf-8"), re.DOTALL)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert printed_by(code, "docs/gpu.md") == [f"True {{{device!r}}}"]


@pytest.mark.parametrize(("page", "count"), [("weights.md", 5), ("durable.md", 1)])
def test_the_code_of_a_page_prints_what_the_page_says(page: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("COLUMNS", "100")  # of the table
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) >= count
    for code, printed in blocks:
        lines = printed_by(code, page)
        assert lines
        assert not printed or lines == printed.splitlines()
