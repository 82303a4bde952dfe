import importlib.util
import json
from pathlib import Path

import pytest

from ipex_quant.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "tools" / "docs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_every_family_is_listed_with_what_its_entry_says(hooks):
    from ipex_quant.llm.decoder.families import FAMILIES

    listed = {name.strip("`"): rest for name, *rest in rows(hooks.families())[2:]}
    assert listed.keys() == FAMILIES.keys()
    assert listed["LlamaDecoderLayer"] == ["rotary, halves", "pre-norm", "gated"]
    assert listed["MixtralDecoderLayer"][2] == "experts"
    assert listed["BloomBlock"][0] == "ALiBi"
    assert listed["GPTNeoXLayer"][1] == "pre-norm; parallel attention and MLP"


def test_every_recipe_is_listed_with_its_measured_cost(hooks):
    listed = {name.strip("`"): rest for name, *rest in rows(hooks.recipes())[2:]}
    assert sorted(listed) == sorted(recipe_names())
    costs = json.loads((ROOT / "ipex_quant" / "recipes" / "costs.json").read_text())["recipes"]
    assert {name for name, cells in listed.items() if cells[1]} == costs.keys()
    assert float(listed["w8a16"][1]) == pytest.approx(costs["w8a16"]["perplexity"], abs=0.005)


def test_marks_are_replaced_and_unknown_ones_refused(hooks):
    page = hooks.on_page_markdown("before\n<!-- generated: recipes -->\nafter", page=None, config=None, files=None)
    assert page.startswith("before\n| recipe |")
    assert page.endswith("\nafter")
    with pytest.raises(ValueError, match="expected one of"):
        hooks.on_page_markdown("<!-- generated: unknown -->")


def test_the_marks_of_the_pages_are_known(hooks):
    texts = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    assert {name for text in texts for name in hooks.MARK.findall(text)} == set(hooks.TABLES)
