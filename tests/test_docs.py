"""The documentation agrees with the code: tables, links, examples, citation."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import spxdask
from spxdask.tables.provenance import ACKNOWLEDGMENT, RELEASE_DOIS, SOFTWARE_TITLE
from spxdask.tables.schema import LIGHT_CURVE, PER_IMAGE, column_rows

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", flags=re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name_of)
def test_tables_are_those_of_the_code(page, generate):
    text = page.read_text()
    assert text == generate.fill_page(text, generate.make_tables()), (
        "a table does not agree with the code: run `python docs/generate.py`"
    )


def test_every_table_is_on_a_page(generate):
    text = "".join(page.read_text() for page in PAGES)
    asked_for = [found[2] for found in generate.BLOCK.finditer(text)]
    assert sorted(asked_for) == sorted(generate.make_tables())


def test_the_environment_does_not_change_the_tables(generate, monkeypatch):
    expected = generate.make_tables()
    for name in ("SPXDASK_TAP_URL", "SPXDASK_ARCHIVE_URL"):
        monkeypatch.setenv(name, "https://example.org")
    assert generate.make_tables() == expected


def test_every_column_is_described():
    rows = column_rows()
    assert {name for name, *_ in rows} == {*PER_IMAGE, *LIGHT_CURVE}
    assert all(meaning for *_, meaning in rows)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page):
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} does not exist"
        assert target.is_relative_to(ROOT), f"{link} is outside of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_compile(page):
    for number, code in enumerate(PYTHON.findall(page.read_text()), 1):
        compile(code, f"{page.name}, example {number}", "exec")


def test_every_page_is_in_the_table_of_contents():
    contents = ROOT / "docs" / "README.md"
    linked = {link.partition("#")[0] for link in LINK.findall(contents.read_text())}
    pages = {page.name for page in contents.parent.glob("*.md")} - {contents.name}
    assert pages <= linked


def test_the_readme_has_the_test_command_that_ci_runs():
    [command] = re.findall(
        r"^python3 -m venv \.venv && .*pytest$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert "'.[test]'" in command


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == spxdask.__version__
    assert f"## [{spxdask.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_files_of_a_run_ask_to_be_cited_as_the_repository_does():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    readme = " ".join((ROOT / "README.md").read_text().replace("\n> ", " ").split())
    assert citation["title"] == SOFTWARE_TITLE
    assert ACKNOWLEDGMENT in readme
    assert {one["doi"] for one in citation["references"]} == set(RELEASE_DOIS.values())
    assert all(f"{name.upper()} [{doi}]" in readme for name, doi in RELEASE_DOIS.items())
