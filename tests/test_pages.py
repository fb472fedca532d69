# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The code of the README and of the guides runs, and says what they say it does.

What a statement prints, or the error that it raises, is in a comment behind it or in
the line below, or in a block of text right below its block.
"""

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

import pyro_macro as pm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST = re.compile(r"`((?:\.\./\w+/)?test_\w+\.py)`")
BLOCK = r"^```python\n(.*?)^```\n(?:\s*```text\n(.*?)^```$)?"


def blocks(page):
    """Blocks of code, each with the text that follows, or an empty one."""
    return re.findall(BLOCK, page.read_text(), re.MULTILINE | re.DOTALL)


def said(code, text, statement):
    """What is said that a statement does."""
    here, below, *_ = [*code.splitlines()[statement.end_lineno - 1 :], ""]
    comment = re.search(r"\)  # (.*)$", here) or re.match(r"# (.*)$", below)
    return text.rstrip("\n") if comment is None else comment[1]


def done(statement, names):
    """What a statement prints, or the name of the error that it raises."""
    printed = io.StringIO()
    code = compile(ast.Module([statement], []), "page", "exec")
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, names)
    except pm.PyroMacroError as error:
        return type(error).__name__
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name
)
def test_code_does_what_is_said(page):
    torch.set_default_dtype(torch.float32)  # as a reader has it
    names = {}
    for code, text in blocks(page):
        told = []
        for statement in ast.parse(code).body:
            found = done(statement, names)
            if found:
                assert found == said(code, text, statement), ast.unparse(statement)
                told.append(found)
        raised = re.findall(r"\)  # ([A-Z][A-Za-z]+)$", code, re.MULTILINE)
        assert set(raised) <= set(told) and (not text or told), code


def test_there_is_code_to_run():
    assert len(blocks(ROOT / "README.md")) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_linked_to_are_there(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_tests_of_the_papers_are_there():
    page = (ROOT / "docs" / "equations.md").read_text()
    sections = re.split(r"`(tests/paper_\w+/)`", page)[1:]
    folders, tables = sections[::2], sections[1::2]
    assert folders == ["tests/paper_aggregation/", "tests/paper_consolidation/"]
    for folder, table in zip(folders, tables, strict=True):
        named = {(ROOT / folder / name).resolve() for name in TEST.findall(table)}
        own = set((ROOT / folder).glob("test_*.py"))
        assert own <= named and all(path.exists() for path in named)


def test_public_names_are_documented():
    pages = (ROOT / "docs" / "api").glob("*.rst")
    text = "\n".join(page.read_text() for page in pages)
    found = set(re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.MULTILINE))
    assert set(pm.__all__) - found == set()


def test_tutorials_are_stored_as_they_ran():
    """The site shows them as they are stored; `make notebooks` runs them afresh."""
    notebooks = sorted((ROOT / "tutorials").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        order = [cell["execution_count"] for cell in code]
        assert order == list(range(1, len(code) + 1)), path.name
        kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
        assert "error" not in kinds, path.name
