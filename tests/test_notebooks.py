"""The notebooks as committed: complete, small, whole; README's index of equations names what exists.

That they run, and print what they did, is checked by nbval, which runs them cell by cell.
"""
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EQUATIONS = {"01_gfrnet": 12, "02_asffnet": 18, "03_dfdnet": 11, "04_dmdnet": 19, "05_restoreformer": 19}
NOTEBOOKS = ("00_common", *EQUATIONS, "06_comparison")


def cells(name, kind):
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"]
            if cell["cell_type"] == kind]


def index():
    """README's table → {notebook: {number of the equation: its names}}."""
    header, *rows = [line.strip("|").split("|") for line in (ROOT / "README.md").read_text().splitlines()
                     if line.startswith(("| Eq.", "| ("))]
    names = [re.search(r"notebooks/(\w+)\.ipynb", title)[1] for title in header[1:]]
    return {name: {int(row[0].strip(" ()")): re.findall(r"`([\w.]+)`", row[column]) for row in rows
                   if row[column].strip()} for column, name in enumerate(names, 1)}


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_numbered_equation_stands_in_its_notebook_in_order_and_in_the_index(name):
    text = "\n".join(cell["source"] for cell in cells(name, "markdown"))
    numbers = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", text)]
    assert sorted(set(numbers)) == list(range(1, EQUATIONS[name] + 1))
    assert sorted(index()[name]) == list(range(1, EQUATIONS[name] + 1))


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_function_that_the_index_names_exists_and_its_notebook_speaks_of_it(name):
    script = importlib.import_module(name[3:])
    text = "\n".join(cell["source"] for kind in ("markdown", "code") for cell in cells(name, kind))
    for names in index()[name].values():
        assert names
        for function in names:
            place, function = (importlib.import_module("common"), function.removeprefix("common.")) \
                if function.startswith("common.") else (script, function)
            assert callable(getattr(place, function, None)), function
            assert re.search(rf"\b{function}\b", text), f"{name} never names {function}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_saved_and_clean_and_small(name):
    file = ROOT / "notebooks" / f"{name}.ipynb"
    assert file.stat().st_size < 1.5e6
    code = cells(name, "code")
    assert all(cell["execution_count"] for cell in code)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))      # top to bottom
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) or "image/jpeg" in output.get("data", {})
               for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"
                or output.get("name") == "stderr"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_brings_no_network_of_its_own_and_compares_something(name):
    code = cells(name, "code")
    assert not [cell for cell in code if re.search(r"requests\.|urlopen|pip install", cell["source"])]
    compared = [cell for cell in code if "nbval-ignore-output" not in cell["metadata"].get("tags", [])]
    assert sum("assert" in cell["source"] for cell in code) >= 5
    assert sum(bool(cell["outputs"]) for cell in compared) >= 5
