import copy
import inspect
import os
import pickle

import pytest
import torch

from ipex_quant.cpu.binding import available_processors
from ipex_quant.cpu.runtime import CPUPool, get_core_list_of_node_id, is_runtime_ext_enabled, pin

ABSENT = 8000


def test_the_extension_needs_no_preloading():
    assert is_runtime_ext_enabled()


def test_cores_of_a_pool(processors):
    pool = CPUPool(processors[:1])
    assert pool.core_ids == pool.get_core_list() == pool.cpu_pool.get_core_list() == processors[:1]
    assert CPUPool(processors).core_ids == processors
    assert CPUPool(range(processors[0], processors[0] + 1)).core_ids == processors[:1]
    assert set(CPUPool().core_ids) <= set(processors)
    assert repr(pool) == f"CPUPool([{processors[0]}])"
    assert copy.deepcopy(pool).core_ids == pickle.loads(pickle.dumps(pool)).core_ids == pool.core_ids


def test_cores_of_a_node(processors):
    node = get_core_list_of_node_id(0)
    assert node == sorted(set(node))
    assert set(CPUPool(node_id=0).core_ids) <= set(processors)
    assert set(CPUPool(node_id=0).core_ids) <= set(node)
    for wrong in (999, -1, "0"):
        with pytest.raises(ValueError, match="expected one of the NUMA nodes"):
            get_core_list_of_node_id(wrong)
        with pytest.raises(ValueError, match="expected one of the NUMA nodes"):
            CPUPool(node_id=wrong)


def test_cores_that_are_not_there(processors):
    with pytest.warns(UserWarning, match=rf"left out cores \[{ABSENT}\]"):
        pool = CPUPool([processors[0], ABSENT])
    assert pool.core_ids == [processors[0]]
    with pytest.raises(ValueError, match=rf"may use none of the core_ids \[{ABSENT}\]"):
        CPUPool([ABSENT])
    with pytest.raises(ValueError, match=r"may use none of the core_ids \[\]"):
        CPUPool([])


def test_cores_that_taskset_withholds(processors, new_thread):
    def pools():
        os.sched_setaffinity(0, processors[:1])
        return CPUPool(), CPUPool(processors[:1]), CPUPool(node_id=0)

    assert {tuple(pool.core_ids) for pool in new_thread(pools)} == {(processors[0],)}


def test_wrong_cores(processors):
    for wrong in (3, "0", [0.5], [None], {0}):
        with pytest.raises(TypeError, match="expected a list or range of int"):
            CPUPool(wrong)
    for wrong in ([-1], [0, 0]):
        with pytest.raises(ValueError, match="expected different numbers from 0 on"):
            CPUPool(wrong)
    with pytest.warns(UserWarning, match="node_id has no effect beside core_ids"):
        assert CPUPool(processors[:1], node_id=0).core_ids == processors[:1]


def state():
    return os.sched_getaffinity(0), torch.get_num_threads()


def test_pin_binds_and_restores(processors, new_thread):
    def check():
        torch.set_num_threads(3)
        before = state()
        with pin(CPUPool(processors[-1:])) as pinned:
            assert isinstance(pinned, pin)
            assert state() == ({processors[-1]}, 1)
            with pin(CPUPool(processors)):
                assert state() == (set(processors), len(processors))
            assert state() == ({processors[-1]}, 1)
        assert state() == before

    new_thread(check)


def test_pin_binds_the_whole_team(processors, new_thread, threads):
    def check():
        before = threads()
        pool = CPUPool(processors)
        os.sched_setaffinity(0, processors[-1:])
        torch.set_num_threads(len(processors))
        torch.ones(1 << 20).sum()
        team = threads().keys() - before.keys()
        assert len(team) == len(processors) - 1
        with pin(pool):
            torch.ones(1 << 20).sum()
            assert all(threads()[thread] == set(processors) for thread in team)
        torch.ones(1 << 20).sum()
        assert all(threads()[thread] == {processors[-1]} for thread in team)
        assert threads().keys() - before.keys() == team

    new_thread(check)


def test_pin_restores_after_an_exception(processors):
    before = state()
    with pytest.raises(KeyError), pin(CPUPool(processors[-1:])):
        raise KeyError
    assert state() == before


def test_pin_that_the_system_refuses_changes_nothing():
    pool = CPUPool()
    pool.core_ids = [ABSENT]
    before = state()
    with pytest.raises(OSError, match="Invalid argument"), pin(pool):
        pass
    assert state() == before
    assert available_processors() == before[0]


def test_pools_can_be_made_while_pinned(processors):
    with pin(CPUPool(processors[-1:])):
        assert CPUPool(processors).core_ids == processors
        with pin(CPUPool(processors[:1])):
            assert CPUPool(processors).core_ids == processors
            assert state() == ({processors[0]}, 1)


def test_pin_decorates(processors):
    before = state()
    pool = CPUPool(processors[-1:])

    class Model:
        @pin(pool)
        def method(self, depth):
            """A method."""
            return self.method(depth - 1) if depth else state()

    assert Model().method(2) == ({processors[-1]}, 1)
    assert Model.method.__doc__ == "A method."
    assert list(inspect.signature(Model.method).parameters) == ["self", "depth"]
    assert state() == before


def test_pin_works_in_several_threads_at_once(processors, new_thread):
    pinned = pin(CPUPool(processors[-1:]))
    with pinned:
        with pinned:
            assert new_thread(lambda: pinned.__enter__() and (state(), pinned.__exit__(None, None, None))[0]) == (
                {processors[-1]},
                1,
            )
            assert state() == ({processors[-1]}, 1)
        assert state() == ({processors[-1]}, 1)


def test_pin_refuses_what_suspends():
    pinned = pin(CPUPool())

    def generator():
        yield

    async def coroutine():
        pass

    async def generator_too():
        yield

    for function in (generator, coroutine, generator_too):
        with pytest.raises(TypeError, match="would leave its caller pinned"):
            pinned(function)
    with pytest.raises(TypeError, match="expected a CPUPool, got list"):
        pin([0])


def test_results_do_not_depend_on_pinning(processors):
    model, x = torch.nn.Conv2d(8, 16, 3), torch.randn(4, 8, 9, 9)
    with torch.no_grad():
        expected = model(x)
        with pin(CPUPool(processors[-1:])):
            assert torch.allclose(model(x), expected)
