import copy
import os
import pickle
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest
import torch

from ipex_quant.cpu.runtime import CPUPool, Task


@pytest.fixture
def pool(processors):
    return CPUPool(processors[-1:])


def test_a_task_runs_on_its_cores(pool, processors):
    task = Task(lambda: (os.sched_getaffinity(0), torch.get_num_threads(), threading.get_ident()), pool)
    affinity, count, thread = task().get()
    assert affinity == {processors[-1]}
    assert count == 1
    assert thread == task.run_sync()[2] != threading.get_ident()
    assert Task(torch.get_num_threads, CPUPool(processors)).run_sync() == len(processors)


def test_a_task_is_asynchronous_and_in_order(pool):
    go, done = threading.Event(), []
    task = Task(lambda i: (go.wait(60), done.append(i)), pool)
    futures = [task(i) for i in range(3)]
    assert not futures[0].done()
    with pytest.raises(FutureTimeoutError):
        futures[0].get(timeout=0.01)
    go.set()
    futures[2].get()
    assert all(future.done() for future in futures)
    assert done == [0, 1, 2]


def test_modules_functions_and_scripts(pool):
    model, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    expected = model(x)
    for module in (model, torch.jit.script(model), torch.jit.trace(model, x), lambda input: model(input)):
        assert torch.equal(Task(module, pool)(input=x).get(), expected)


def test_exceptions_reach_get(pool):
    task = Task(torch.nn.Linear(8, 4), pool)
    future = task(torch.zeros(3, 7))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        future.get()
    assert task.run_sync(torch.zeros(3, 8)).shape == (3, 4)


def test_copies_have_threads_of_their_own(pool):
    task = Task(torch.nn.Linear(8, 4), pool)
    x = torch.randn(3, 8)
    expected = task.run_sync(x)
    for other in (copy.deepcopy(task), copy.copy(task), pickle.loads(pickle.dumps(task))):
        assert torch.equal(other.run_sync(x), expected)
        assert other._stream is not task._stream
    other = copy.deepcopy(task)
    with torch.no_grad():
        other.module.weight.zero_()
    assert torch.equal(task.run_sync(x), expected)


def test_two_tasks_at_once(processors):
    meet = threading.Barrier(2)
    tasks = [Task(lambda: meet.wait(60), CPUPool(processors[:1])) for _ in range(2)]
    assert sorted(future.get() for future in [task() for task in tasks]) == [0, 1]


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


def test_the_callers_state(pool):
    task = Task(state, pool)
    for _ in range(2):
        assert task.run_sync() == state()
        with torch.no_grad():
            assert task.run_sync() == state()
        with torch.inference_mode():
            assert task.run_sync() == state()
            with torch.inference_mode(False):
                assert task.run_sync() == state()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            assert task.run_sync() == state()
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                assert task.run_sync() == state()


def test_casted_weights_do_not_outlive_the_callers_autocast(pool):
    model, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    go = threading.Event()
    task = Task(lambda: (go.wait(60), model(x))[1], pool)
    with torch.autocast("cpu", torch.bfloat16):
        future = task()
    go.set()
    assert future.get().dtype == torch.bfloat16
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).count_nonzero() == 0


def test_wrong_arguments(pool):
    with pytest.raises(TypeError, match="expected a module or function, got int"):
        Task(3, pool)
    with pytest.raises(TypeError, match="expected a CPUPool, got list"):
        Task(torch.nn.Linear(1, 1), [0])


def test_threads_end_with_their_task(pool, threads):
    before = threads().keys()
    task = Task(torch.nn.Linear(8, 4), pool)
    (thread,) = task._stream._executor._threads
    assert thread.native_id in threads()
    del task
    thread.join(60)
    assert not thread.is_alive()
    deadline = time.monotonic() + 10
    while threads().keys() - before and time.monotonic() < deadline:  # its team ends a moment later
        time.sleep(0.01)
    assert not threads().keys() - before
