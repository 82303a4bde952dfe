import json
import xml.etree.ElementTree as ElementTree

import pytest

from ipex_quant.autotune import Report
from ipex_quant.autotune.trials import Trial, TrialRecord


def trial(index, metric, size, met=True):
    return Trial(index, {"n": index}, f"recipe <{index}>", metric, 1 - metric, met, size * 10**6, 0.5, 0.25, None, 2.0)


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
    assert lines[1].split()[-8:] == ["0.95", "0.05", "yes", "12.00", "0.5000", "0.25", "-", "2.0"]
    assert "float model: 1; allowed loss: 0.1 relative" in foot


def test_json(report, tmp_path):
    report.write(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["best"] == 1
    assert values["pareto_front"] == [3, 0, 1]
    assert values["trials"][2]["metric"] == 0.93


def test_html_stands_alone(report, tmp_path):
    report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "recipe &lt;1&gt;" in page
    assert "<script" not in page
    assert "src=" not in page
    assert "href=" not in page
    svgs = ["<svg" + part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    scatter, bars = map(ElementTree.fromstring, svgs)
    namespace = "{http://www.w3.org/2000/svg}"
    points = [c for c in scatter.iter(f"{namespace}circle") if c.find(f"{namespace}title") is not None]
    assert len(points) == 4
    assert len(next(iter(scatter.iter(f"{namespace}polyline"))).get("points").split()) == 3
    heights = [float(bar.get("height")) for bar in bars.iter(f"{namespace}rect") if len(bar)]
    assert len(heights) == 5
    assert heights == sorted(heights, reverse=True)


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
    bars = [part for part in page.split("<rect")[1:] if part.split(">")[1] == "<title"]
    assert "height='0.0'" in bars[0]
    assert "1e-12" not in page
    assert "1e-4" in page, "the lowest bar has some height"
    nothing = Report(1.0, "0.1 relative", 0, [trial(0, 1.0, 10)], {"a": {"error": 0.0}}).to_html()
    assert nothing.count("<svg") == 1


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
