"""A model quantized by llama.cpp's tools, with or without an importance matrix; see produce.py.

`float.gguf` holds its weights as llama.cpp dequantizes them, `sizes.json` the type, bytes and numbers of each tensor.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from gguf import GGUFReader
from produce import Task, task

TOOLS = Path(sys.prefix) / "build" / "bin"


def importance(job: Task) -> Path:
    """The importance matrix of a model, which is computed once for a calibration text."""
    text = Path(job.calibration).read_bytes()
    path = Path(job.shared) / f"imatrix-{hashlib.sha256(text).hexdigest()[:8]}.gguf"
    if not path.is_file():
        temporary = path.with_suffix(".tmp")
        options = ["-c", job.length, "-b", job.length, "-t", job.threads, "--no-ppl", "--output-format", "gguf"]
        _run("llama-imatrix", "-m", job.gguf, "-f", job.calibration, "-o", temporary, *options)
        temporary.rename(path)
    return path


def _run(tool: str, *arguments: object) -> None:
    subprocess.run([str(TOOLS / tool), *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    job = task()
    out = Path(job.out)
    out.mkdir()
    quantized = out / "quantized.gguf"
    options = ["--imatrix", importance(job)] if job.settings["imatrix"] else []
    if job.settings["tables_in_float"]:
        options += ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    _run("llama-quantize", *options, job.gguf, quantized, job.settings["type"], job.threads)
    tensors = GGUFReader(quantized).tensors
    sizes = {each.name: (each.tensor_type.name, int(each.n_bytes), int(each.n_elements)) for each in tensors}
    _run("llama-quantize", "--allow-requantize", quantized, out / "float.gguf", "F32", job.threads)
    quantized.unlink()
    (out / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")


if __name__ == "__main__":
    main()
