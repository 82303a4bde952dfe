"""Named ways to quantize a model: the YAML files in this folder, or the user's own."""

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
