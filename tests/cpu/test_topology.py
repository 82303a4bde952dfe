import os

import pytest

from ipex_quant.cpu import topology


def test_lists_of_numbers():
    assert topology.parse_list("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert topology.parse_list("\n") == []
    with pytest.raises(ValueError, match="invalid literal"):
        topology.parse_list("0-")
    with pytest.raises(ValueError, match="invalid literal"):
        topology.parse_list("all")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two nodes of two cores with two hardware threads each, and a node with memory only."""
    for node, text in {0: "0-1,4-5", 1: "2-3,6-7", 2: ""}.items():
        (tmp_path / "node" / f"node{node}").mkdir(parents=True)
        (tmp_path / "node" / f"node{node}" / "cpulist").write_text(f"{text}\n")
    for processor in range(8):
        directory = tmp_path / "cpu" / f"cpu{processor}" / "topology"
        directory.mkdir(parents=True)
        (directory / "thread_siblings_list").write_text(f"{processor % 4},{processor % 4 + 4}\n")
    monkeypatch.setattr(topology, "_NODES", tmp_path / "node")
    monkeypatch.setattr(topology, "_PROCESSORS", tmp_path / "cpu")


@pytest.mark.usefixtures("machine")
def test_nodes_and_cores():
    assert topology.numa_nodes() == {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}
    assert topology.node_processors(1) == [2, 3, 6, 7]
    assert topology.one_a_core(range(8)) == [0, 1, 2, 3]
    assert topology.one_a_core([7, 6, 5, 2]) == [2, 5, 7]
    with pytest.raises(ValueError, match=r"expected one of the NUMA nodes \[0, 1\], got 2"):
        topology.node_processors(2)


def test_without_a_description(tmp_path, monkeypatch):
    monkeypatch.setattr(topology, "_NODES", tmp_path)
    monkeypatch.setattr(topology, "_PROCESSORS", tmp_path)
    assert topology.numa_nodes() == {0: list(range(os.cpu_count()))}
    assert topology.one_a_core([3, 1]) == [1, 3]


def test_this_machine():
    described = {processor for processors in topology.numa_nodes().values() for processor in processors}
    assert described >= os.sched_getaffinity(0)
    assert set(topology.one_a_core(described)) <= described
