"""The two READMEs: their tables are what the scripts print from toy/results, their links exist."""
import contextlib
import io
import re

import helpers
import pytest

from toy import ablation, digits, geometry, rivals, two_moons

ROOT = helpers.SCRIPT.parent
PAGES = [ROOT / "README.md", ROOT / "toy" / "README.md"]
COMMANDS = [(digits, []), (two_moons, ["--show"]), (geometry, []), (ablation, []), (rivals, [])]


def table_rows(text):
    """The rows of all Markdown tables in a text, as lists of cells without bold face."""
    lines = [line.strip() for line in text.splitlines()]
    rows = [line.strip("|").replace("**", "") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row.split("|")] for row in rows if "---" not in row]


def numbers(text):
    return re.findall(r"\d[\d,]*\.\d+", text)


@pytest.fixture(scope="module")
def printed():
    """What each script prints from the committed results: {module: text}."""
    texts = {}
    for module, flags in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            helpers.run(*flags, main=module.main)
        texts[module] = out.getvalue()
    return texts


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS])
def test_the_page_holds_every_table_that_a_script_prints(module, printed):
    page = table_rows(PAGES[1].read_text())
    rows = table_rows(printed[module])
    assert len(rows) > 4
    assert [row for row in rows if row not in page] == []


def measured_columns(text):
    """The cells of a page's tables whose column is not the paper's."""
    cells = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, *rows = table_rows(table)
        for row in rows:
            cells += [cell for name, cell in zip(header, row) if not name.startswith("paper")]
    return cells


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_every_number_of_a_table_is_in_the_results(path, printed):
    """The tables in which something was computed or comes from elsewhere are left out by name."""
    known = set(numbers("".join(printed.values())))
    text = path.read_text()
    text = re.sub(r"<summary><b>ImageNet-256.*", "", text, flags=re.DOTALL)
    found = [number for cell in measured_columns(text) for number in numbers(cell)]
    assert len(found) >= 10
    assert [number for number in found if number not in known] == []


def anchors(text):
    """GitHub's names of the headings of a page."""
    names = set()
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", title.lower())
        names.add(words.replace(" ", "-"))
    return names


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_links_of_a_page_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        other = path.parent / file if file else path
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other.read_text()), target
