"""Draw a bar chart of a result of peers.py, as PNG beside it; needs an environment with matplotlib.

python benchmarks/peers_chart.py benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PHASES = {"prefill": "prompt", "decode": "new tokens"}
OURS, THEIRS = "#1f6fb4", "#a9b4bd"


def draw(result: dict, shape: str, path: Path) -> None:
    """Draw tokens per second of every engine, fastest first, for prefill and for decode."""
    machine, records = result["machine"], [r for r in result["generate"] if r["shape"] == shape]
    measured = [r for r in records if "error" not in r]
    figure, panels = plt.subplots(1, len(PHASES), figsize=(11, 0.42 * len(measured) + 1.3))
    for panel, (phase, title) in zip(panels, PHASES.items(), strict=True):
        ordered = sorted(measured, key=lambda r: r[f"{phase}_tokens_per_second"])
        rates = [r[f"{phase}_tokens_per_second"] for r in ordered]
        names = [r["engine"] for r in ordered]
        colors = [OURS if name.startswith("ours") else THEIRS for name in names]
        bars = panel.barh([name.replace("ours", "ipex_quant") for name in names], rates, color=colors)
        panel.bar_label(bars, fmt="%.3g", padding=3)
        panel.set_xlim(0, 1.15 * max(rates))
        panel.set_title(f"{title}: token/s")
        panel.spines[["top", "right"]].set_visible(False)
    first = records[0]
    figure.suptitle(
        f"{shape}, prompt of {first['prompt']} and {first['new_tokens']} new tokens, "
        f"{machine['threads']} threads of {machine['cpu']}",
        fontsize=10,
    )
    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--shape", default="llama-1.1b")
    args = parser.parse_args()
    draw(json.loads(args.result.read_text(encoding="utf-8")), args.shape, args.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
