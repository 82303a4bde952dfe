import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from ipex_quant.autotune import Report
from ipex_quant.autotune.trials import Trial, TrialRecord


def trial(index, metric, size, met=True):
    return Trial(
        index, {"n": index}, f"recipe <{index}>", metric, 1 - metric, None, met, size * 10**6, 0.5, 0.25, None, 2.0
    )


@pytest.fixture
def report():
    trials = [trial(0, 0.90, 10), trial(1, 0.95, 12), trial(2, 0.93, 13, False), trial(3, 0.85, 9)]
    sensitivity = {f"layer{i}": {"error": 10.0**-i, "alpha": 0.5} for i in range(5)}
    return Report(1.0, "0.1 relative", 1, trials, sensitivity)


def test_the_pareto_front(report):
    assert [each.index for each in report.pareto_front] == [3, 0, 1]


def test_the_table(report):
    head, *lines, foot = report.table().splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in (head, *lines)}) == 1
    assert [line[:3].strip() for line in lines] == ["p", "*p", "", "p"]
    assert lines[1].split()[-9:] == ["0.95", "0.05", "-", "yes", "12.00", "0.5000", "0.25", "-", "2.0"]
    assert "float model: 1; allowed loss: 0.1 relative" in foot


def test_json(report, tmp_path):
    report.write(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["best"] == 1
    assert values["pareto_front"] == [3, 0, 1]
    assert values["trials"][2]["metric"] == 0.93


pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"


def svgs_of(page):
    return ["<svg" + part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]


def group(svg, name):
    return next(each for each in svg.iter(f"{SVG}g") if each.get("id", "").endswith(f"-{name}"))


def bars_of(svg):
    return [each.find(f"{SVG}path") for each in svg.iter(f"{SVG}g") if "-error-" in each.get("id", "")]


def height(path):
    ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.get("d"))]
    return max(ys) - min(ys)


def test_html_stands_alone(report, tmp_path):
    report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "recipe &lt;1&gt;" in page
    assert "<script" not in page
    assert "src=" not in page
    assert all(target.startswith('"#') for target in page.split("href=")[1:]), "only to what is in the page"
    scatter, bars = map(ElementTree.fromstring, svgs_of(page))
    ids = [[each.get("id") for each in svg.iter() if each.get("id")] for svg in (scatter, bars)]
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1]), "ids are unique in the page"
    assert len(list(group(scatter, "trials").iter(f"{SVG}use"))) == 4
    assert group(scatter, "front").find(f"{SVG}path").get("d").count("L") == 2
    assert len(list(group(scatter, "best").iter(f"{SVG}path"))) == 1
    heights = [height(bar) for bar in bars_of(bars)]
    assert len(heights) == 5
    assert heights == sorted(heights, reverse=True)
    assert min(heights) > 0
    assert len(set(heights)) == 5, "no bar is cut"


def test_the_plot_alone(report, tmp_path):
    report.write(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text() in report.to_html()
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")


def test_one_trial_is_enough(tmp_path):
    Report(1.0, "0.1 relative", None, [trial(0, 1.0, 10)], {}).write(tmp_path / "report.html")
    assert "has not ended" in (tmp_path / "report.html").read_text()


def test_a_layer_without_error_has_no_height():
    sensitivity = {"a": {"error": 0.0}, "b": {"error": 1e-3}, "c": {"error": 2e-2}}
    page = Report(1.0, "0.1 relative", 0, [trial(0, 1.0, 10)], sensitivity).to_html()
    none, low, high = map(height, bars_of(ElementTree.fromstring(svgs_of(page)[1])))
    assert 0 == none < low < high
    nothing = Report(1.0, "0.1 relative", 0, [trial(0, 1.0, 10)], {"a": {"error": 0.0}}).to_html()
    assert nothing.count("<svg") == 1


def test_many_layers_have_no_names_below_their_bars():
    sensitivity = {f"layer{i}": {"error": 1.0} for i in range(200)}
    svg = svgs_of(Report(1.0, "0.1 relative", 0, [trial(0, 1.0, 10)], sensitivity).to_html())[1]
    assert "layer7" not in svg


def test_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"report: it has no plots.*pip install ipex_quant\[autotune\]"):
        report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "recipe &lt;1&gt;" in page
    assert "<svg" not in page
    with pytest.raises(ImportError, match=r"pip install ipex_quant\[autotune\]"):
        report.write(tmp_path / "plot.svg")


def test_a_record_is_read(tmp_path):
    record = TrialRecord(tmp_path / "r.jsonl", {"criterion": "0.1 relative"})
    record.set_baseline(1.0, 0.0)
    record.add(trial(0, 0.9, 10))
    assert Report.of(tmp_path / "r.jsonl").best is None
    record.finish(trial(0, 0.9, 10), {"layer": {"error": 1.0}})
    report = Report.of(tmp_path / "r.jsonl")
    assert (report.best, report.baseline, len(report.trials)) == (0, 1.0, 1)


def test_bad_paths(report, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.html, \.json, \.svg"):
        report.write(tmp_path / "report.pdf")
    with pytest.raises(ValueError, match="does not exist"):
        report.write(tmp_path / "no" / "report.html")
