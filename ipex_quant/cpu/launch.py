"""`ipexrun`: torch's launcher for CPUs, under IPEX's name and with IPEX's options beside torch's.

It runs a program once or several times at once, each instance on cores of its own, with the OpenMP library and memory
allocator that one asks for; or as the processes of `torch.distributed` on one machine.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch.backends.xeon import run_cpu

from .topology import node_processors, numa_nodes, one_a_core, parse_list

_LATENCY_CORES = 4
_BENCHMARK_MALLOC_CONF = (
    "oversize_threshold:1,background_thread:false,metadata_thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"
)
_ALLOCATORS = {"default": "use_default_allocator", "tcmalloc": "enable_tcmalloc", "jemalloc": "enable_jemalloc"}
_UNBOUND = {"numactl": ("taskset",), "taskset": ("numactl",), "none": ("numactl", "taskset")}
"""What each task manager does without."""

_NOT_HERE = {
    **dict.fromkeys(("hostfile", "extra-mpi-params"), "to train on several machines, launch torchrun on each"),
    "dtype": "call ipex.optimize(model, dtype=...) in the program",
}
_FLAGS_NOT_HERE = dict.fromkeys(
    ("auto-ipex", "auto-ipex-verbose", "disable-ipex-graph-mode"), "call ipex.optimize(model) in the program"
)

_KEEP_STATUS = '"$@"; status=$?; [ $status = 0 ] || echo $status > "$0"; exit $status'
"""For sh: torch's launcher does not tell whether a program failed."""

_TAKE_RANK = (
    'rank=0; while [ $rank -lt {size} ] && ! mkdir "$0.rank$rank" 2>/dev/null; do rank=$((rank + 1)); done; '
    "export RANK=$rank LOCAL_RANK=$rank PMI_RANK=$rank WORLD_SIZE={size} LOCAL_WORLD_SIZE={size} PMI_SIZE={size}; "
)
"""For sh: torch's launcher does not tell an instance its number. Ranks are under torch's names and those of MPI."""

_log = logging.getLogger("ipex_quant")


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch what a command line says; return 0, or the status of an instance that failed.

    Exits with 2 for a wrong command line.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _distribute(options)
        _translate(options)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="ipexrun-") as directory:
        status = Path(directory) / "status"
        _run_in_shell(options, status)
        run_cpu.main(options)
        return int(status.read_text().split()[0]) if status.exists() else 0


def _parser() -> argparse.ArgumentParser:
    # Abbreviations would be looked for in the arguments of the program, too.
    parser = argparse.ArgumentParser(prog="ipexrun", description=__doc__, allow_abbrev=False)
    group = parser.add_argument_group("IPEX's names", "for options that torch names otherwise, below")

    def add(name: str, **settings: Any) -> None:
        group.add_argument(f"--{name}", f"--{name.replace('-', '_')}", **settings)

    add("cores-list", metavar="LIST", help="cores to use, such as 0-3,8")
    add("nodes-list", metavar="LIST", help="NUMA nodes to use, such as 0-1")
    add("use-logical-cores", dest="use_logical_core", action="store_true", help="all hardware threads of a core")
    add(
        "instance-idx",
        dest="rank",
        metavar="I",
        type=int,
        default=argparse.SUPPRESS,
        help="run only this one of the instances",
    )
    add("bind-numa-node", action="store_true", help="keep each instance on one NUMA node")
    add("strategy", choices=("scatter", "close"), help="close: instances take cores in order, as torch does it")
    add("memory-allocator", choices=("auto", *_ALLOCATORS), default="auto", help="which allocator to preload")
    add("benchmark", action="store_true", help="let jemalloc keep freed memory")
    add("omp-runtime", choices=("auto", "default", "intel"), default="auto", help="which OpenMP library to preload")
    add("multi-task-manager", choices=("auto", *_UNBOUND), default="auto", help="what binds instances to cores")
    add("use-e-cores", action="store_true", help="no effect: torch's launcher uses all kinds of cores")
    add("log-dir", dest="log_path", metavar="DIR", default="", help="where to write logs")
    distributed = parser.add_argument_group("torch.distributed", "processes of one program on this machine")

    def add_distributed(name: str, **settings: Any) -> None:
        distributed.add_argument(f"--{name}", f"--{name.replace('-', '_')}", **settings)

    add_distributed("nnodes", metavar="N", type=int, default=0, help="number of machines: 1")
    add_distributed(
        "nprocs-per-node", metavar="N", type=int, default=0, help="number of processes; 0: one for each NUMA node"
    )
    add_distributed("master-addr", metavar="HOST", help="MASTER_ADDR of the program; by default 127.0.0.1")
    add_distributed("master-port", metavar="PORT", type=int, help="MASTER_PORT of the program; by default 29500")
    add_distributed("ccl-worker-count", metavar="N", type=int, help="CCL_WORKER_COUNT of the program")
    add_distributed("logical-cores-for-ccl", action="store_true", help="no effect: no cores are kept for oneCCL")
    for name in _NOT_HERE:
        add(name, help=argparse.SUPPRESS)
    for name in _FLAGS_NOT_HERE:
        add(name, action="store_true", default=None, help=argparse.SUPPRESS)
    run_cpu.create_args(parser)
    return parser


def _distribute(options: argparse.Namespace) -> None:
    """Turn the options for `torch.distributed` into instances, and the variables that tell them of each other.

    Raises ValueError for more than one machine, and for options that choose instances otherwise.
    """
    if options.nnodes > 1:
        raise ValueError(f"--nnodes: expected 1, got {options.nnodes}; launch torchrun on each of several machines")
    options.nprocs_per_node = options.nprocs_per_node or (options.nnodes and _node_count(options))
    if not options.nprocs_per_node:
        return
    if options.nprocs_per_node < 0:
        raise ValueError(f"--nprocs-per-node: expected a positive number, got {options.nprocs_per_node}")
    if options.ninstances > 0 or options.rank != -1 or options.latency_mode or options.throughput_mode:
        raise ValueError(
            "--nprocs-per-node: expected none of --ninstances, --instance-idx, --latency-mode and --throughput-mode"
        )
    options.ninstances = options.nprocs_per_node
    for name, value, default in (
        ("MASTER_ADDR", options.master_addr, "127.0.0.1"),
        ("MASTER_PORT", options.master_port, "29500"),
        ("CCL_WORKER_COUNT", options.ccl_worker_count, None),
    ):
        if value is not None:
            os.environ[name] = str(value)
        elif default is not None:
            os.environ.setdefault(name, default)
    if options.ccl_worker_count is not None:
        _log.warning("--ccl-worker-count: no cores are kept for oneCCL's workers; processes compute on all of theirs")


def _node_count(options: argparse.Namespace) -> int:
    return len(parse_list(options.nodes_list)) if options.nodes_list else len(numa_nodes())


def _translate(options: argparse.Namespace) -> None:
    """Set torch's options to what IPEX's say.

    Raises ValueError for what torch's launcher has no equivalent of, and for cores or nodes that cannot be used.
    """
    for name, instead in {**_NOT_HERE, **_FLAGS_NOT_HERE}.items():
        if getattr(options, name.replace("-", "_")) is not None:
            raise ValueError(f"--{name} is not supported: {instead}")
    if options.memory_allocator != "auto":
        setattr(options, _ALLOCATORS[options.memory_allocator], True)
    if options.benchmark:
        os.environ.setdefault("MALLOC_CONF", _BENCHMARK_MALLOC_CONF)
    if options.omp_runtime == "default":
        options.disable_iomp = True
    for program in _UNBOUND.get(options.multi_task_manager, ()):
        setattr(options, f"disable_{program}", True)
    # IPEX: 0 divides evenly, and so does -1, which deals out the remaining cores too. Torch: -1 divides evenly.
    options.ninstances = options.ninstances or -1
    options.ncores_per_instance = options.ncores_per_instance or -1
    if len(numa_nodes()) > 1:
        if options.strategy == "scatter":
            _log.warning("--strategy scatter: torch's launcher gives instances cores in order, as 'close' does")
        if options.bind_numa_node:
            _bind_instances_to_nodes(options)
    _choose_cores(options)


def _bind_instances_to_nodes(options: argparse.Namespace) -> None:
    if options.ncores_per_instance > 0 and options.ninstances < 0:
        options.skip_cross_node_cores = True
    else:
        _log.warning(
            "--bind-numa-node: torch's launcher keeps instances on one node only with --ncores-per-instance and "
            "without --ninstances; an instance may run on two"
        )


def _choose_cores(options: argparse.Namespace) -> None:
    """Name the cores to torch's launcher, which else takes all of the machine, also what a container withholds."""
    nodes = numa_nodes()
    if options.cores_list and options.nodes_list:
        raise ValueError("--cores-list and --nodes-list: expected one of them")
    available = os.sched_getaffinity(0)
    if options.cores_list:
        cores = parse_list(options.cores_list)
    elif options.nodes_list:
        cores = [core for node in parse_list(options.nodes_list) for core in node_processors(node)]
    elif (
        options.core_list is None
        and options.node_id == -1
        and (
            options.nprocs_per_node
            or available < {c for n in nodes.values() for c in n}
            or _instance_exceeds(options, available)
        )
    ):
        cores = sorted(available)
    else:
        return
    if not options.cores_list and not options.use_logical_core:
        cores = one_a_core(cores)
    if absent := sorted(set(cores) - available):
        raise ValueError(
            f"cores {absent} do not exist, or this process may not use them; it may use {sorted(available)}"
        )
    if options.latency_mode:
        options.ncores_per_instance = min(_LATENCY_CORES, len(cores))
    elif options.throughput_mode:
        options.ncores_per_instance = len(cores) // sum(not set(cores).isdisjoint(node) for node in nodes.values())
    elif options.ncores_per_instance == -1:
        options.ncores_per_instance = len(cores) // max(options.ninstances, 1)
    if not 0 < options.ncores_per_instance * max(options.ninstances, 1) <= len(cores):
        raise ValueError(
            f"expected at most {len(cores)} cores in all instances, got --ninstances {options.ninstances}, "
            f"--ncores-per-instance {options.ncores_per_instance}"
        )
    used = options.ninstances * options.ncores_per_instance if options.ninstances > 0 else len(cores)
    options.core_list = ",".join(map(str, cores[:used]))  # torch's launcher would start more instances on the rest


def _instance_exceeds(options: argparse.Namespace, available: Collection[int]) -> bool:
    """Whether torch's launcher would start no instance at all, and say nothing, for want of cores for one."""
    cores = available if options.use_logical_core else one_a_core(available)
    asked = _LATENCY_CORES if options.latency_mode else options.ncores_per_instance
    return (options.ninstances < 0 and asked > len(cores)) or options.ninstances > len(cores)


def _run_in_shell(options: argparse.Namespace, status: Path) -> None:
    """Let a shell run the program, which writes the exit status to the file `status` if it is not 0.

    The processes of `torch.distributed` get their ranks in the order in which they start.
    """
    size = options.nprocs_per_node
    script = _TAKE_RANK.format(size=size) + _KEEP_STATUS if size else _KEEP_STATUS
    command = [options.program, *options.program_args]
    if not options.no_python:
        command = [sys.executable, "-u", *(["-m"] if options.module else []), *command]
    options.program, options.program_args = "sh", ["-c", script, str(status), *command]
    options.no_python, options.module = True, False


if __name__ == "__main__":
    sys.exit(main())
