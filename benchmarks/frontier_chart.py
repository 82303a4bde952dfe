"""Draw the frontier of a result of frontier.py, as SVG and PNG; needs an environment with matplotlib.

python benchmarks/frontier_chart.py benchmarks/results/FILE.json docs/images/frontier
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from frontier_report import Record, frontier, parts

WAYS = 2
"""Ways to count bytes."""

OURS = "ipex_quant"
STYLES = {
    OURS: ("#1f6fb4", "o"),
    "llama.cpp": ("#d1672b", "^"),
    "auto-round": ("#3a9d5d", "s"),
    "llm-compressor": ("#8a5fb0", "D"),
    "GPTQModel": ("#b03a48", "v"),
    "NNCF": ("#7a7a7a", "P"),
    "neural-compressor": ("#b5a03a", "X"),
}


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw a panel for each model and way to count, with the frontier of each producer as a line."""
    models = list(dict.fromkeys(record["model"] for record in records))
    figure, panels = plt.subplots(len(models), WAYS, figsize=(11, 4.2 * len(models)), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for panel, (title, size, own) in zip(row, parts([r for r in records if r["model"] == model]), strict=True):
            for producer, (color, marker) in STYLES.items():
                points = [r for r in own if r["producer"] == producer]
                if not points:
                    continue
                own_style = {"s": 14, "color": color, "marker": marker, "alpha": 0.5}
                panel.scatter([8 * r[size] for r in points], [r["kl"] for r in points], **own_style)
                best = frontier(points, size)
                line = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.8 if producer == OURS else 1}
                panel.plot([8 * r[size] for r in best], [r["kl"] for r in best], label=producer, **line)
            panel.set(title=f"{model}: {title}", xlabel="bits a weight", ylabel="KL divergence from float, nats")
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    for suffix in (".svg", ".png"):
        temporary = path.with_suffix(f".tmp{suffix}")
        figure.savefig(temporary, dpi=120)
        temporary.replace(path.with_suffix(suffix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path, help="the image's path without suffix")
    args = parser.parse_args()
    records = json.loads(args.result.read_text(encoding="utf-8"))["frontier"]
    draw([record for record in records if "error" not in record], args.image)


if __name__ == "__main__":
    main()
