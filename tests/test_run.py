import json
import os
import subprocess
import sys

import pytest

from ipex_quant.run import CHILDREN

REPORT = """
import json, os, sys
import intel_extension_for_pytorch as ipex
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "version": ipex.__version__,
    "main": sys.modules["__main__"].__file__,
}))
"""


def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.fixture
def script(tmp_path):
    def write(text, name="script.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_a_script_sees_what_it_sees_below_python(script, tmp_path):
    path = script(REPORT)
    report = json.loads(run("-m", "ipex_quant.run", path, "a", "-m", "--help").stdout)
    assert report.pop("version").startswith("2.8")
    plain = REPORT.replace("import intel_extension_for_pytorch as ipex", "").replace('"version": ipex.__version__,', "")
    assert report == json.loads(run(script(plain), "a", "-m", "--help").stdout)


def test_a_module_sees_what_it_sees_below_python(script, tmp_path):
    script(REPORT, "module.py")
    plain = REPORT.replace("import intel_extension_for_pytorch as ipex", "").replace('"version": ipex.__version__,', "")
    report = json.loads(run("-m", "ipex_quant.run", "-m", "module", "a", cwd=tmp_path).stdout)
    assert report.pop("version").startswith("2.8")
    script(plain, "module.py")
    assert report == json.loads(run("-m", "module", "a", cwd=tmp_path).stdout)


@pytest.mark.parametrize(
    ("text", "status", "output"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('why')", 1, "why"),
        ("raise KeyError('which')", 1, "KeyError: 'which'"),
        ("import os; os._exit(4)", 4, ""),
    ],
)
def test_the_status_is_the_scripts(script, text, status, output):
    result = run("-m", "ipex_quant.run", script(text))
    assert result.returncode == status
    assert output in result.stderr


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--unknown"], ["-m", "--unknown"]])
def test_wrong_usage(arguments):
    result = run("-m", "ipex_quant.run", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("usage:")


@pytest.mark.parametrize("program", ["intel_extension_for_pytorch.cpu.launch", "ipex_quant.cpu.launch"])
def test_ipexs_launcher(script, program):
    path = script("import intel_extension_for_pytorch as ipex, sys; sys.exit(f'{ipex.__version__} {sys.argv[1:]}')")
    launcher = ("-m", "ipex_quant.run", "-m", program, "--disable-numactl", "--memory-allocator", "default")
    result = run(*launcher, path, "--batch", "2")
    assert result.returncode == 1
    assert "2.8.0+ipex_quant ['--batch', '2']" in result.stderr


def test_help():
    result = run("-m", "ipex_quant.run", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage:")


def test_a_script_that_is_not_there(tmp_path):
    result = run("-m", "ipex_quant.run", str(tmp_path / "none.py"))
    assert result.returncode == 1
    assert "none.py" in result.stderr


SPAWNS = """
import multiprocessing
import intel_extension_for_pytorch as ipex

def version(_):
    return ipex.__version__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(version, [0])[0])
"""

STARTS = """
import subprocess, sys
child = "import intel_extension_for_pytorch as ipex; print(ipex.__version__)"
subprocess.run([sys.executable, "-c", child], check=True)
"""


@pytest.mark.parametrize("text", [SPAWNS, STARTS])
def test_child_processes_have_the_alias_too(script, text):
    result = run("-m", "ipex_quant.run", script(text))
    assert result.stdout.startswith("2.8"), result.stderr


def test_a_sitecustomize_that_was_there_runs_too(script, tmp_path):
    script("print('theirs')", "sitecustomize.py")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run("-m", "ipex_quant.run", script(STARTS), env=environment)
    assert result.stdout.splitlines()[:2] == ["theirs", "theirs"]
    assert result.stdout.splitlines()[2].startswith("2.8"), result.stderr


def test_an_environment_without_this_package_starts(tmp_path):
    environment = {**os.environ, "PYTHONPATH": CHILDREN}
    result = run("-S", "-c", "import sitecustomize; print('started')", env=environment, cwd=tmp_path)
    assert result.stdout == "started\n", result.stderr
