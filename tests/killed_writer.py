"""Run as a process without threads: replaces a file or a directory, killed before every change of the file system.

``killed_writer.py WRITING_PY FOLDER file|directory|directory-without-exchange`` prints what was there after each kill.
"""

import importlib.util
import json
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree", "ctypes.dlsym"}


def main(writing_py: str, folder: str, kind: str) -> None:
    spec = importlib.util.spec_from_file_location("writing", writing_py)
    writing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writing)
    target, seen = Path(folder) / "target", []
    if kind == "directory-without-exchange":
        writing._exchange = lambda one, other: False
    for steps in count():
        old = steps % 3 > 0  # or nothing
        write(writing, target, kind, "old") if old else remove(target)
        finished = killed_after(steps, lambda: write(writing, target, kind, "new"))
        seen.append([old, read(target)])
        with_next = write(writing, target, kind, "next")
        assert read(target) == "next", with_next
        assert os.listdir(folder) == ["target"], "what was killed is swept"
        if finished and steps % 3 == 2:
            break
    print(json.dumps(seen))


def killed_after(steps: int, work) -> bool:
    pid = os.fork()
    if pid == 0:
        left = steps

        def hook(event, arguments):
            nonlocal left
            if event in CHANGES:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def write(writing, target: Path, kind: str, text: str) -> None:
    if kind == "file":
        writing.write_whole(target, text)
        return
    with writing.replaced_directory(target) as staging:
        for name in "abc":
            (staging / name).write_text(text)


def read(target: Path) -> str:
    if not target.exists():
        return "nothing"
    files = [target] if target.is_file() else [target / name for name in "abc"]
    return "+".join(sorted({file.read_text() if file.exists() else "nothing" for file in files}))


def remove(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
