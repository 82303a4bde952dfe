import copy
import multiprocessing
import os
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from ipex_quant import ops
from ipex_quant.cpu.runtime import (
    CPUPool,
    MultiStreamModule,
    MultiStreamModuleHint,
    Task,
    _MultiStreamBenchmarkModule,
    get_default_num_streams,
)
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype


class Apply(nn.Module):
    """Calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def several_streams(function, streams=3, **hints):
    """A module with `streams` streams, also where there are fewer cores: all on the first one."""
    core = CPUPool().core_ids[:1]
    pool = CPUPool(core)
    pool.core_ids = core * streams
    model = function if isinstance(function, nn.Module) else Apply(function)
    return MultiStreamModule(model, streams, pool, **hints)


def test_cores_are_dealt_out(processors):
    for streams in range(1, min(len(processors), 4) + 1):
        module = MultiStreamModule(
            Apply(lambda x: (sorted(os.sched_getaffinity(0)), torch.get_num_threads(), threading.get_ident())),
            streams,
            CPUPool(processors),
            concat_output=False,
        )
        results = module(torch.zeros(streams))
        assert [cores for cores, _, _ in results] == [
            part.tolist() for part in torch.tensor(processors).tensor_split(streams)
        ]
        assert all(len(cores) == count for cores, count, _ in results)
        assert len({thread for _, _, thread in results} | {threading.get_ident()}) == streams + 1
        assert results == module(torch.zeros(streams))


def test_the_batch_is_dealt_out():
    module = several_streams(lambda x: x, concat_output=False)
    assert [len(part) for part in module(torch.zeros(8))] == [3, 3, 2]
    assert [len(part) for part in module(torch.zeros(2))] == [1, 1]
    assert [len(part) for part in module(torch.zeros(0))] == [0]
    assert several_streams(lambda x: x)(torch.arange(8)).tolist() == list(range(8))


def test_a_single_stream_needs_no_hints():
    """IPEX calls the model as it is, so that scripts run on one core, whatever they pass."""
    x, y = torch.randn(4, 2), torch.randn(3)
    model = Apply(lambda x, y, *, scale: (x.sum() * scale, float(y.sum())))
    expected = model(x, y, scale=x)
    for concat in (True, False):
        got = several_streams(model, 1, concat_output=concat)(x, y, scale=x)
        (got,) = (got,) if concat else got
        assert torch.equal(got[0], expected[0])
        assert got[1] == expected[1]


def test_streams_run_at_the_same_time():
    meet = threading.Barrier(3)
    module = several_streams(lambda x: x + meet.wait(60) * 0)
    assert module(torch.ones(3)).sum() == 3


def test_number_of_streams(processors):
    pool = CPUPool()
    cores = len(pool.core_ids)
    assert get_default_num_streams(pool) == cores
    assert MultiStreamModule(nn.ReLU()).get_stream_number() == cores
    with pytest.warns(UserWarning, match=f"num_streams: {cores + 1} is more than the cores of .*; using {cores}"):
        assert MultiStreamModule(nn.ReLU(), cores + 1).get_stream_number() == cores
    for automatic in ("AUTO", "auto"):
        assert MultiStreamModule(nn.ReLU(), automatic).get_stream_number() == cores
    for wrong in ("all", 1.0, None):
        with pytest.raises(TypeError, match='expected "AUTO" or an int'):
            MultiStreamModule(nn.ReLU(), wrong)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="expected 1 or more"):
            MultiStreamModule(nn.ReLU(), wrong)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="model: expected a module, got int"):
        MultiStreamModule(3)
    with pytest.raises(TypeError, match="cpu_pool: expected a CPUPool, got list"):
        MultiStreamModule(nn.ReLU(), cpu_pool=[0])
    with pytest.raises(TypeError, match="input_split_hint: expected a MultiStreamModuleHint, got int"):
        MultiStreamModule(nn.ReLU(), input_split_hint=0)
    for hint in (MultiStreamModuleHint(0, 0), MultiStreamModuleHint(0, y=0), MultiStreamModuleHint()):
        with pytest.raises(ValueError, match="output_concat_hint: expected one argument for the one result"):
            MultiStreamModule(nn.ReLU(), output_concat_hint=hint)
    with pytest.raises(TypeError, match="MultiStreamModuleHint: key: expected None, a dimension"):
        MultiStreamModuleHint(key="0")
    assert repr(MultiStreamModuleHint((0, None), y=1)) == "MultiStreamModuleHint((0, None), y=1)"


def test_arguments_by_position_and_keyword():
    hint = MultiStreamModuleHint(0, None, y=(1, 0), unused=0)
    module = several_streams(
        lambda x, scale, y, flag: (x * scale, {"y": y, "flag": flag}),
        input_split_hint=hint,
        output_concat_hint=MultiStreamModuleHint((0, {"y": (1, 0), "flag": None})),
    )
    x, y = torch.randn(5, 2), (torch.randn(2, 5), torch.randn(5))
    scale = torch.tensor([2.0])
    product, rest = module(x, scale, y=y, flag="flag")
    assert torch.equal(product, x * 2)
    assert torch.equal(rest["y"][0], y[0])
    assert torch.equal(rest["y"][1], y[1])
    assert rest["flag"] == "flag"
    with pytest.raises(ValueError, match=r"arguments\['scale'\]: the hint does not name it, and it holds tensors"):
        module(x, scale=scale, y=y, flag="flag")
    with pytest.raises(ValueError, match=r"arguments\[0\] has 5, arguments\['y'\]\[0\] has 4"):
        module(x, scale, y=(y[0][:, :4], y[1]), flag="flag")


def test_keywords_only():
    module = several_streams(
        lambda **inputs: {"sum": inputs["function"] + inputs["self_"]},
        input_split_hint=MultiStreamModuleHint(function=0, self_=0),
        output_concat_hint=MultiStreamModuleHint(sum=0),
    )
    x = torch.randn(4, 3)
    assert torch.equal(module(function=x, self_=x)["sum"], 2 * x)


def bert():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    return BertModel(config).eval()


def test_a_transformers_model():
    model = bert()
    module = several_streams(model, input_split_hint=MultiStreamModuleHint(input_ids=0, attention_mask=0))
    ids, mask = torch.randint(0, 99, (5, 7)), torch.ones(5, 7, dtype=torch.long)
    mask[2, 4:] = 0
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask)
        got = module(input_ids=ids, attention_mask=mask)
    assert type(got) is type(expected)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("kind", ["traced", "frozen", "scripted"])
def test_scripted_modules(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        script = torch.jit.script(model) if kind == "scripted" else torch.jit.trace(model, x)
        module = several_streams(torch.jit.freeze(script) if kind == "frozen" else script)
        for _ in range(3):
            torch.testing.assert_close(module(x), model(x))


def test_gradients_flow_through_streams():
    model, x = nn.Linear(6, 3), torch.randn(7, 6, requires_grad=True)
    several_streams(model)(x).square().sum().backward()
    got = [x.grad, model.weight.grad, model.bias.grad]
    expected = torch.autograd.grad(model(x).square().sum(), [x, model.weight, model.bias])
    torch.testing.assert_close(got, list(expected))


def test_the_callers_state():
    def state(x):
        return x.new_tensor(
            [
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu") == torch.float16,
                torch.is_autocast_cache_enabled(),
            ]
        )[None].expand(len(x), -1)

    module, x = several_streams(state), torch.zeros(3)
    for mode in (
        torch.no_grad(),
        torch.enable_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.float16, cache_enabled=False),
    ):
        with mode:
            assert torch.equal(module(x), state(x))
        assert torch.equal(module(x), state(x))


def test_streams_share_casted_weights_with_the_caller():
    model = nn.Linear(6, 3)
    module, x = several_streams(model), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        assert expected.dtype == torch.bfloat16
        with torch.no_grad():
            model.weight.zero_()  # which the casted copy does not see
        assert torch.equal(module(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(module(x), expected)


def test_an_exception_waits_for_the_other_streams():
    ended = []

    def work(x):
        if x[0] == 0:
            raise KeyError("the first stream")
        if x[0] == 1:
            raise IndexError("the second stream")
        ended.append(torch.randn(200, 200).matmul(torch.randn(200, 200)).shape)
        return x

    module = several_streams(work)
    for count in (1, 2):
        with pytest.raises(KeyError, match="the first stream"):
            module(torch.arange(3))
        assert len(ended) == count
    assert module(torch.full([3], 5)).tolist() == [5, 5, 5]


def test_several_callers_at_once(new_thread):
    module = several_streams(lambda x: x.cumsum(1))
    x = torch.randn(40, 6, 50)
    tasks = [Task(lambda part: [module(batch) for batch in part], CPUPool()) for _ in range(3)]
    futures = [task(x) for task in tasks]
    for future in futures:
        assert torch.equal(torch.stack(future.get()), x.cumsum(2))


def test_copies_and_pickles():
    model = nn.Linear(6, 3)
    module, x = MultiStreamModule(model, 1, concat_output=True), torch.randn(4, 6)
    expected = model(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other._streams[0] is not module._streams[0]
        with torch.no_grad():
            module.model.weight.add_(1)
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            module.model.weight.sub_(1)
    assert list(module.state_dict()) == ["model.weight", "model.bias"]
    assert not module.eval().model.training
    assert "1 streams on CPUPool(" in repr(module)


def test_threads_end_with_the_module(threads):
    before = threads().keys()
    module = several_streams(nn.ReLU())
    workers = [thread for stream in module._streams for thread in stream._executor._threads]
    assert len({thread.native_id for thread in workers} & threads().keys()) == 3
    first = {thread.native_id for thread in workers}
    module(torch.ones(3))
    assert threads().keys() - before == first
    del module
    for thread in workers:
        thread.join(60)
    assert not any(thread.is_alive() for thread in workers)
    assert not first & threads().keys()


def _send(module, x, queue):
    queue.put(module(x).tolist())


def test_a_forked_process_has_streams_of_its_own():
    module, x = several_streams(nn.ReLU()), torch.tensor([-1.0, 2.0, 3.0])
    assert module(x).tolist() == [0, 2, 3]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forking with threads
        process = context.Process(target=_send, args=(module, x, queue))
        process.start()
    assert queue.get(timeout=60) == [0, 2, 3]
    process.join(60)
    assert process.exitcode == 0


def test_quantized_linears_in_streams():
    torch.manual_seed(0)
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 32)
    model = nn.Sequential(
        *(
            WeightOnlyQuantizedLinear.from_quantized_weight(ops.quantize_weight(torch.randn(64, 64), scheme))
            for _ in "123"
        )
    )
    module, x = several_streams(model), torch.randn(6, 9, 64)
    with torch.no_grad():
        for _ in range(20):
            assert torch.equal(module(x), torch.cat([model(part) for part in x.split(2)]))


def test_native_ops_use_the_streams_number_of_threads(processors, threads):
    weight = ops.pack_weight(ops.quantize_weight(torch.randn(512, 512), WeightScheme(WoqWeightDtype.INT8, True, -1)))
    model = Apply(lambda x: ops.woq_linear(x, weight.data, 512))
    before = threads().keys()
    module = MultiStreamModule(model, 1, CPUPool(processors))
    module(torch.randn(64, 512))
    assert len(threads().keys() - before) == len(processors)
    del module
    one_each = MultiStreamModule(model, len(processors), CPUPool(processors))
    between = threads().keys()
    one_each(torch.randn(64, 512))
    assert threads().keys() <= between | before


def test_the_benchmark_module_runs_whole_inputs():
    pool = CPUPool(CPUPool().core_ids)
    module = _MultiStreamBenchmarkModule(nn.ReLU(), cpu_pool=pool)
    x = torch.randn(1, 3)
    results = module(x)
    assert len(results) == len(pool.core_ids)
    assert all(torch.equal(result, x.relu()) for result in results)
