"""The page that benchmarks/frontier_html.py makes of a result of frontier.py."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest


@pytest.fixture
def frontier_html(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import frontier_html

    return frontier_html


def record(producer, name, bits, kl, in_float=True, **others):
    values = {
        "kl_99th_percentile": 10 * kl,
        "top1_agreement": 0.9,
        "perplexity": 20.5,
        "seconds": 1.0,
        "megabytes": bits,
    }
    sizes = {"bytes_per_weight": bits / 8 + 1, "linear_bytes_per_weight": bits / 8, "tables_in_float": in_float}
    said = {"tokens": 64, "texts": "a text", "reference_perplexity": 20.0}
    return {"model": "tiny", "producer": producer, "name": name, **values, **sizes, **said, "kl": kl, **others}


@pytest.fixture
def records():
    return [
        record("peer", "four <bits>", 4.0, 0.02),
        record("ipex_quant", "ours of four", 4.0, 0.01),
        record("ipex_quant", "ours of eight", 8.0, 0.0, in_float=False),
        {"model": "tiny", "producer": "peer", "name": "broken", "error": "exit status 1"},
    ]


def test_the_page_has_charts_and_tables_of_all_quantizers(frontier_html, records, tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text(json.dumps({"frontier": records}))
    monkeypatch.setattr(sys, "argv", ["frontier_html", str(tmp_path / "result.json"), str(tmp_path / "page.html")])
    frontier_html.main()
    page = (tmp_path / "page.html").read_text()
    assert "peer: four &lt;bits&gt;" in page
    assert page.count("<h2>tiny: ") == 2
    linears, whole = page.split("<h2>tiny: ")[1:]
    assert "ours of eight" not in linears
    beaten = whole[: whole.index("four &lt;bits&gt;")].rpartition("<tr")[2]
    best = whole[: whole.index("ours of four")].rpartition("<tr")[2]
    assert ('class="front"' in best, 'class="front"' in beaten) == (True, False)
    assert "tiny, peer: broken: exit status 1" in page
    svgs = [f"<svg{part.split('</svg>')[0]}</svg>" for part in page.split("<svg")[1:]]
    ids = [[each.get("id") for each in ElementTree.fromstring(svg).iter() if each.get("id")] for svg in svgs]
    assert len(svgs) == 2
    assert not set(ids[0]) & set(ids[1]), "ids are unique in the page"
    assert all("ipex_quant" in svg and "peer" in svg for svg in svgs)


def test_without_matplotlib_there_are_tables(frontier_html, records, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match="frontier_html: it has no charts: the plots are made by matplotlib"):
        page = frontier_html.page(records)
    assert "<svg" not in page
    assert "ours of eight" in page
