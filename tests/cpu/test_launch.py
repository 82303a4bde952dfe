import os
import socket
import subprocess
import sys

import pytest

from ipex_quant.cpu import launch

MEETING = ("MASTER_ADDR", "MASTER_PORT", "CCL_WORKER_COUNT")


@pytest.fixture
def launched(monkeypatch):
    """What torch's launcher is called with for a command line."""
    calls = []
    for name in MEETING:
        monkeypatch.setenv(name, "")  # what a launch sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch.run_cpu, "main", calls.append)
    monkeypatch.setattr(launch, "numa_nodes", lambda: {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]})
    monkeypatch.setattr(launch, "node_processors", lambda node: {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}[node])
    monkeypatch.setattr(launch, "one_a_core", lambda cores: [core for core in sorted(cores) if core % 2 == 0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def call(line):
        assert launch.main([*line.split(), "script.py", "--batch", "2"]) == 0
        return calls.pop()

    return call


def test_the_program_runs_in_pythons_or_as_it_is(launched):
    assert launched("").program_args[-4:] == ["-u", "script.py", "--batch", "2"]
    assert launched("-m").program_args[-5:] == ["-u", "-m", "script.py", "--batch", "2"]
    assert launched("--no-python").program_args[3:] == ["script.py", "--batch", "2"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {"core_list": None, "ninstances": -1, "ncores_per_instance": -1, "rank": -1, "log_path": ""}),
        ("--ninstances 4 --instance-idx 1", {"ninstances": 4, "rank": 1}),
        ("--ninstances 4 --rank 1 --ncores_per_instance 2", {"rank": 1, "ncores_per_instance": 2}),
        ("--ninstances 0 --ncores-per-instance 0", {"ninstances": -1, "ncores_per_instance": -1}),
        ("--latency-mode", {"latency_mode": True, "core_list": None}),
        ("--throughput_mode", {"throughput_mode": True}),
        ("--use-logical-cores", {"use_logical_core": True}),
        ("--use-logical-core", {"use_logical_core": True}),
        ("--memory-allocator jemalloc", {"enable_jemalloc": True, "enable_tcmalloc": False}),
        ("--memory_allocator tcmalloc", {"enable_tcmalloc": True}),
        ("--memory-allocator default", {"use_default_allocator": True}),
        ("--use_default_allocator", {"use_default_allocator": True}),
        ("--memory-allocator auto", {"enable_tcmalloc": False, "enable_jemalloc": False}),
        ("--omp-runtime default", {"disable_iomp": True}),
        ("--omp-runtime intel", {"disable_iomp": False}),
        ("--multi-task-manager none", {"disable_numactl": True, "disable_taskset": True}),
        ("--multi-task-manager taskset", {"disable_numactl": True, "disable_taskset": False}),
        ("--multi-task-manager numactl", {"disable_numactl": False, "disable_taskset": True}),
        ("--log-dir logs --log-file-prefix mine", {"log_path": "logs", "log_file_prefix": "mine"}),
        ("--cores-list 0-3,6", {"core_list": "0,1,2,3,6", "ncores_per_instance": 5}),
        ("--cores-list 0-4 --ninstances 2", {"core_list": "0,1,2,3", "ncores_per_instance": 2}),
        ("--cores-list 0-4 --ncores-per-instance 2", {"core_list": "0,1,2,3,4", "ncores_per_instance": 2}),
        ("--nodes-list 1", {"core_list": "4,6", "ncores_per_instance": 2}),
        ("--nodes-list 0-1 --use-logical-cores", {"core_list": "0,1,2,3,4,5,6,7", "ncores_per_instance": 8}),
        ("--nodes-list 0,1 --throughput-mode", {"core_list": "0,2,4,6", "ncores_per_instance": 2}),
        ("--nodes-list 0 --latency-mode", {"core_list": "0,2", "ncores_per_instance": 2}),
        ("--bind-numa-node --ncores-per-instance 3", {"skip_cross_node_cores": True}),
        ("--strategy close --use-e-cores", {"core_list": None}),
        ("--core-list 0,1 --ncores-per-instance 1", {"core_list": "0,1", "ncores_per_instance": 1}),
    ],
)
def test_options_are_translated(launched, line, expected):
    options = vars(launched(line))
    assert {name: options[name] for name in expected} == expected


def test_only_what_the_process_may_use(launched, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 4})
    options = launched("")
    assert (options.core_list, options.ncores_per_instance) == ("2,4", 2)
    options = launched("--ninstances 1 --ncores-per-instance 1")
    assert (options.core_list, options.ncores_per_instance) == ("2", 1)
    options = launched("--use-logical-cores --ncores-per-instance 1")
    assert (options.core_list, options.ncores_per_instance) == ("2,3,4", 1)


def test_small_machines_run_one_instance_for_latency(launched, monkeypatch):
    """Torch's launcher starts none where there are not four cores, and returns as if it had."""
    monkeypatch.setattr(launch, "numa_nodes", lambda: {0: [0, 1, 2, 3]})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    options = launched("--latency-mode")
    assert (options.core_list, options.ncores_per_instance) == ("0,2", 2)


def test_options_of_the_program_are_its_own(launched, monkeypatch):
    calls = []
    monkeypatch.setattr(launch.run_cpu, "main", calls.append)
    assert launch.main(["--ninstances", "2", "script.py", "--b", "--ninst", "3", "--benchmark"]) == 0
    assert calls[0].program_args[-5:] == ["script.py", "--b", "--ninst", "3", "--benchmark"]
    assert calls[0].ninstances == 2
    assert not calls[0].benchmark


def test_benchmark_configures_jemalloc(launched, monkeypatch):
    monkeypatch.setenv("MALLOC_CONF", "mine")
    launched("--benchmark")
    assert os.environ["MALLOC_CONF"] == "mine"
    monkeypatch.delenv("MALLOC_CONF")
    launched("--benchmark")
    assert "dirty_decay_ms:-1" in os.environ["MALLOC_CONF"]


@pytest.mark.parametrize("line", ["--strategy scatter", "--bind-numa-node", "--bind-numa-node --ninstances 2"])
def test_what_torch_cannot_do_is_warned_of(launched, caplog, line):
    launched(line)
    assert line.split()[0] in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--nnodes 2 --nprocs-per-node 2", "--nnodes: expected 1, got 2; launch torchrun on each of several machines"),
        ("--hostfile hosts", "--hostfile is not supported: to train on several machines, launch torchrun on each"),
        ("--nprocs-per-node -2", "expected a positive number"),
        ("--nprocs-per-node 2 --ninstances 2", "expected none of --ninstances"),
        ("--nprocs-per-node 2 --latency-mode", "expected none of --ninstances"),
        ("--nprocs-per-node 5", "at most 4 cores in all instances, got --ninstances 5"),
        ("--auto-ipex", r"--auto-ipex is not supported: call ipex.optimize(model) in the program"),
        ("--dtype bfloat16", "call ipex.optimize(model, dtype=...) in the program"),
        ("--cores-list 0-3 --nodes-list 0", "expected one of them"),
        ("--cores-list 7-9", "cores [8, 9] do not exist, or this process may not use them"),
        ("--cores-list 0-1 --ninstances 3", "at most 2 cores in all instances, got --ninstances 3"),
        ("--cores-list 0-1 --ninstances 2 --ncores-per-instance 2", "at most 2 cores"),
        ("--ncores-per-instance 5", "at most 4 cores in all instances, got --ninstances -1, --ncores-per-instance 5"),
        ("--ninstances 5", "at most 4 cores in all instances, got --ninstances 5"),
        ("--cores-list all", "invalid literal"),
        ("--memory-allocator malloc", "invalid choice"),
    ],
)
def test_wrong_command_lines(launched, capsys, line, message):
    with pytest.raises(SystemExit) as exit:
        launched(line)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--nprocs-per-node 2", {"ninstances": 2, "ncores_per_instance": 2, "core_list": "0,2,4,6"}),
        ("--nprocs-per-node 2 --use-logical-cores", {"ncores_per_instance": 4, "core_list": "0,1,2,3,4,5,6,7"}),
        ("--nprocs_per_node 3 --cores-list 1-7", {"ninstances": 3, "ncores_per_instance": 2}),
        ("--nnodes 1", {"ninstances": 2}),
        ("--nnodes 1 --nodes-list 1", {"ninstances": 1, "core_list": "4,6"}),
    ],
)
def test_processes_are_instances(launched, line, expected):
    options = vars(launched(line))
    assert {name: options[name] for name in expected} == expected


def test_where_processes_meet(launched, caplog):
    launched("--nprocs-per-node 2")
    assert [os.environ.get(name) for name in MEETING] == ["127.0.0.1", "29500", None]
    assert not caplog.text
    launched("--nprocs-per-node 2 --master-addr here --master-port 7 --ccl-worker-count 1")
    assert [os.environ.get(name) for name in MEETING] == ["here", "7", "1"]
    assert "no cores are kept for oneCCL" in caplog.text
    launched("--nprocs-per-node 2")
    assert [os.environ.get(name) for name in MEETING] == ["here", "7", "1"]


RANKS = """
import os, pathlib, sys, torch, torch.distributed as dist
assert os.environ["PMI_RANK"] == os.environ["LOCAL_RANK"] == os.environ["RANK"]
assert os.environ["PMI_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == "2"
dist.init_process_group("gloo")
value = torch.tensor([10 ** dist.get_rank()])
dist.all_reduce(value)
result = f"sum={value.item()} threads={torch.get_num_threads()} cores={os.sched_getaffinity(0)}"
pathlib.Path(sys.argv[1]).joinpath(str(dist.get_rank())).write_text(result)
dist.destroy_process_group()
sys.exit(3 if "--fail" in sys.argv and os.environ["RANK"] == "1" else 0)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("failing", [False, True])
def test_processes_train_together(tmp_path, failing):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nprocs-per-node", "2", "--cores-list", f"{first},{second}", "--master-port", str(port)]
    command = [
        sys.executable,
        "-m",
        "ipex_quant.cpu.launch",
        *options,
        str(script),
        str(tmp_path),
        *["--fail"] * failing,
    ]
    hidden = ("OMP_NUM_THREADS", "MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == (3 if failing else 0)
    results = {(tmp_path / rank).read_text() for rank in ("0", "1")}
    assert results == {f"sum=11 threads=1 cores={ {core} }" for core in (first, second)}


def test_a_program_runs_on_its_cores(tmp_path):
    core = max(os.sched_getaffinity(0))
    script = tmp_path / "script.sh"
    script.write_text(
        '#!/bin/sh\necho "threads=$OMP_NUM_THREADS $1"; grep Cpus_allowed_list /proc/self/status; exit 7\n'
    )
    script.chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "ipex_quant.cpu.launch",
        "--cores-list",
        str(core),
        "--no-python",
        str(script),
        "--x",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "threads=1 --x" in result.stdout
    assert f"Cpus_allowed_list:\t{core}\n" in result.stdout
    assert result.returncode == 7
