"""Affinity of the team's threads, compared with what the system tells of each thread."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ipex_quant import ops
from ipex_quant.ops.affinity import MAX_PROCESSORS


@pytest.fixture
def team():
    """Calls a function in a thread with a team of two, whose threads run on the last processor only."""
    count, last = torch.get_num_threads(), max(os.sched_getaffinity(0))
    with ThreadPoolExecutor(1) as executor:

        def start():
            os.sched_setaffinity(0, [last])
            torch.set_num_threads(2)
            before = set(os.listdir("/proc/self/task"))
            torch.ones(1 << 20).sum()
            return [int(thread) for thread in set(os.listdir("/proc/self/task")) - before]

        (worker,) = executor.submit(start).result()
        yield worker, lambda function: executor.submit(function).result()
    torch.set_num_threads(count)


def test_every_thread_of_the_team_is_bound(team):
    worker, call = team
    everything, last = os.sched_getaffinity(0), max(os.sched_getaffinity(0))
    assert os.sched_getaffinity(worker) == {last}
    before = call(lambda: ops.bind_team(sorted(everything)))
    assert [row.nonzero().flatten().tolist() for row in before] == [[last], [last]]
    assert os.sched_getaffinity(worker) == call(lambda: os.sched_getaffinity(0)) == everything
    bound = call(lambda: ops.set_team_affinity(before))
    assert [set(row.nonzero().flatten().tolist()) for row in bound] == [everything, everything]
    assert os.sched_getaffinity(worker) == call(lambda: os.sched_getaffinity(0)) == {last}
    assert torch.equal(call(ops.team_affinity), before)


def test_an_empty_row_leaves_a_thread(team):
    worker, call = team
    everything = os.sched_getaffinity(0)
    table = torch.zeros(2, MAX_PROCESSORS, dtype=torch.bool)
    table[1, sorted(everything)] = True
    call(lambda: ops.set_team_affinity(table))
    assert os.sched_getaffinity(worker) == everything
    assert call(lambda: os.sched_getaffinity(0)) == {max(everything)}


def test_what_cannot_be_is_refused():
    count = torch.get_num_threads()
    absent = max(int(path.name[3:]) for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*")) + 1
    own = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="cannot be bound: Invalid argument"):
        ops.bind_team([absent])
    with pytest.raises(RuntimeError, match=f"a row for each of {count} threads, got {count + 1}"):
        ops.set_team_affinity(torch.zeros(count + 1, MAX_PROCESSORS, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="expected dtype Bool"):
        ops.set_team_affinity(torch.zeros(count, MAX_PROCESSORS))
    with pytest.raises(RuntimeError, match="expected 2 dimensions"):
        ops.set_team_affinity(torch.zeros(MAX_PROCESSORS, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="columns, got 0"):
        ops.set_team_affinity(torch.zeros(count, 0, dtype=torch.bool))
    assert os.sched_getaffinity(0) == own


def test_the_op_is_registered_correctly():
    table = torch.zeros(torch.get_num_threads(), MAX_PROCESSORS, dtype=torch.bool)
    torch.library.opcheck(torch.ops.ipex_quant.exchange_affinity.default, (table,))
