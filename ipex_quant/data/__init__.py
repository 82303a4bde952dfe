"""A tiny Llama of our own and a text it has never seen, for demos and tests without a download."""

from pathlib import Path


def embedded_model_dir() -> Path:
    """Directory of the embedded model, as AutoModelForCausalLM and AutoTokenizer load it."""
    return Path(__file__).parent / "tiny_llama"


def held_out_text() -> str:
    """Text that the embedded model was not trained on, of some 50 thousand of its tokens, to measure perplexity."""
    return (Path(__file__).parent / "held_out.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """Text of the kind that the embedded model was trained on, to calibrate with: the paragraphs of this Python's
    language reference that share no run of ten words with the held-out text.
    """
    from pydoc_data.topics import topics  # large, and absent where a distribution splits Python up

    held_out = _word_runs(held_out_text())
    paragraphs = (paragraph for _, topic in sorted(topics.items()) for paragraph in topic.split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if held_out.isdisjoint(_word_runs(paragraph)))


def _word_runs(text: str) -> set[str]:
    """All runs of ten words of every paragraph; a shorter paragraph is one run."""
    runs: set[str] = set()
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        runs.update(" ".join(words[i : i + 10]) for i in range(max(1, len(words) - 9)))
    return runs
