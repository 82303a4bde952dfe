import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ipex_quant import ops
from ipex_quant.llm.cache.key_factors import outlier_factors
from ipex_quant.llm.cache.layers import NativeLayer, SlidingLayer
from ipex_quant.nn.deferred import DeferredTensor


def states(batch, length, heads=2, size=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, length, size, generator=generator).to(dtype) for _ in range(2))


def layers(window=None, **options):
    """A layer of ours and the one of transformers that it stands for."""
    if window is None:
        return NativeLayer(**options), DynamicLayer()
    return SlidingLayer(window, **options), DynamicSlidingWindowLayer(window)


def assert_same(ours, theirs, tolerance=0.0):
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a + 0, b, rtol=tolerance, atol=tolerance)


def written(layer):
    return [x[:, :, : layer._used].clone() for x in layer._buffers]


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("lengths", [[7, 1, 1, 1, 1], [1] * 40, [3, 4, 20, 1, 5, 1], [150, 1, 1], [4, 64, 1]])
def test_returns_what_a_dynamic_layer_does(window, batch, indexed, lengths):
    if window == 1:
        lengths = lengths[:1]  # transformers keeps everything then
    ours, theirs = layers(window, indexed=indexed)
    for seed, length in enumerate(lengths):
        key, value = states(batch, length, seed=seed)
        assert ours.get_mask_sizes(length) == theirs.get_mask_sizes(length)
        assert_same(ours.update(key, value), theirs.update(key, value))
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("prompts", [1, 2])
def test_beams_change_an_index_and_nothing_else(window, indexed, prompts):
    ours, theirs = layers(window, indexed=indexed)
    for layer in (ours, theirs):
        layer.update(*states(prompts, 5))
        layer.batch_repeat_interleave(3)
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        beams = torch.randint(3, (prompts, 3), generator=generator) + torch.arange(prompts).unsqueeze(1) * 3
        before = [x.data_ptr() for x in ours._buffers], written(ours)
        ours.reorder_cache(beams.flatten())
        theirs.reorder_cache(beams.flatten())
        assert [x.data_ptr() for x in ours._buffers] == before[0]
        assert all(torch.equal(*pair) for pair in zip(written(ours), before[1], strict=True))
        key, value = states(prompts * 3, 1, seed=step)
        assert_same(ours.update(key, value), theirs.update(key, value))


def test_prompt_is_stored_once_for_all_its_beams():
    prompt, generated, beams = 1024, 8, 4
    ours, theirs = NativeLayer(indexed=True), NativeLayer()
    for layer in (ours, theirs):
        layer.update(*states(2, prompt))
    ours.batch_repeat_interleave(beams)
    assert ours._used == 2 * prompt
    for seed in range(generated):
        ours.update(*states(2 * beams, 1, seed=seed))
    assert ours._used == 2 * prompt + generated * 2 * beams
    token = 2 * 8 * 4 * 2
    assert ours.nbytes < 2 * prompt * token * 1.6 + ours._rows.nbytes


def test_one_prompt_is_not_moved_to_be_indexed():
    layer = NativeLayer()
    layer.update(*states(1, 50))
    before = [x.data_ptr() for x in layer._buffers]
    layer.batch_repeat_interleave(4)
    layer.update(*states(4, 1))
    assert [x.data_ptr() for x in layer._buffers] == before


def test_sequences_are_selected():
    ours, theirs = layers()
    for layer in (ours, theirs):
        layer.update(*states(4, 5))
        layer.batch_select_indices(torch.tensor([3, 1]))
        layer.update(*states(2, 2, seed=1))
        layer.batch_select_indices(torch.tensor([False, True]))
    assert_same(ours.update(*states(1, 1)), theirs.update(*states(1, 1)))
    with pytest.raises(IndexError):
        ours.reorder_cache(torch.tensor([1]))
    assert_same(ours.update(*states(1, 1)), theirs.update(*states(1, 1)))


@pytest.mark.parametrize("beams", [1, 2])
def test_crop(beams):
    ours, theirs = layers()
    for layer in (ours, theirs):
        layer.update(*states(2, 9))
        layer.batch_repeat_interleave(beams)
        layer.crop(-4)
        layer.crop(0)
        layer.update(*states(2 * beams, 2, seed=1))
        layer.crop(-1)
    assert_same((ours.keys, ours.values), (theirs.keys, theirs.values))
    ours.crop(-100)
    assert ours.get_seq_length() == 0
    assert_same(ours.update(*states(2 * beams, 3)), states(2 * beams, 3))
    with pytest.raises(ValueError, match="minus the number"):
        ours.crop(3)


@pytest.mark.parametrize("window", [2, 6])
@pytest.mark.parametrize("indexed", [False, True])
def test_sliding_layer_is_cropped_while_it_records_its_past(window, indexed):
    ours, theirs = layers(window, indexed=indexed)
    for layer in (ours, theirs):
        layer.update(*states(2, 11))
        layer.activate_past_recording()
    generator = torch.Generator().manual_seed(0)
    for seed in range(60):
        length = int(torch.randint(1, 6, (), generator=generator))
        remove = int(torch.randint(length, (), generator=generator))
        assert ours.get_mask_sizes(length) == theirs.get_mask_sizes(length)
        assert_same(ours.update(*states(2, length, seed=seed)), theirs.update(*states(2, length, seed=seed)))
        ours.crop(-remove)
        theirs.crop(-remove)
    assert ours.get_seq_length() == theirs.get_seq_length()


def test_sliding_layer_cannot_take_back_what_has_left_the_window():
    layer = SlidingLayer(4)
    layer.update(*states(1, 3))
    layer.crop(-1)
    layer.update(*states(1, 3))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)


@pytest.mark.parametrize("beams", [1, 3])
def test_sliding_layer_holds_about_two_windows(beams):
    layer = SlidingLayer(256)
    layer.update(*states(1, 10_000))
    layer.batch_repeat_interleave(beams)
    token = 2 * 2 * 8 * 4
    for seed in range(1500):
        layer.update(*states(beams, 1, seed=seed))
        assert layer.nbytes <= beams * 2 * 256 * token + 4 * beams * 600
    assert layer.get_seq_length() == 11_500


def test_capacity_grows_geometrically():
    layer, capacities = NativeLayer(), set()
    for _ in range(4000):
        layer.update(*states(1, 1))
        capacities.add(layer._capacity)
    assert len(capacities) < 13
    assert max(capacities) < 1.6 * 4000


def test_without_spare_room_nothing_is_allocated_for_growth():
    layer = NativeLayer(spare=False)
    layer.update(*states(2, 100))
    assert layer.nbytes == 2 * 100 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.int8, 0.02), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_other_dtypes_are_close_to_float(window, beams, dtype, tolerance):
    ours, theirs = layers(window, storage_dtype=dtype)
    for layer in (ours, theirs):
        layer.update(*states(2, 5))
        layer.batch_repeat_interleave(beams)
    for seed in range(20):
        new = states(2 * beams, 1, seed=seed)
        got, expected = ours.update(*new), theirs.update(*new)
        assert all(isinstance(x, DeferredTensor) for x in got)
        assert_same(got, expected, tolerance)
    assert ours._buffers[0].dtype == dtype


def test_int8_takes_a_quarter_of_float32():
    sizes = {}
    for dtype in (None, torch.int8):
        layer = NativeLayer(dtype)
        layer.update(*states(1, 1000, size=64))
        sizes[dtype] = layer.nbytes
    assert sizes[torch.int8] < 0.27 * sizes[None]


def test_nan_stays_in_its_sequence_and_head():
    layer = NativeLayer(torch.int8)
    key, value = states(3, 4)
    key[1, 0, 2] = torch.nan
    keys, _ = layer.update(key, value)
    damaged = torch.zeros(3, 2, 4, dtype=torch.bool)
    damaged[1, 0, 2] = True
    assert torch.equal((keys + 0).isnan().any(-1), damaged)


def test_deferred_tensor_is_computed_once_and_only_when_needed():
    layer = NativeLayer(torch.int8)
    keys, _ = layer.update(*states(1, 3))
    assert isinstance(keys, DeferredTensor)
    assert keys._values is None
    assert (keys.shape, keys.dtype, keys.device.type) == ((1, 2, 3, 8), torch.float32, "cpu")
    assert keys._values is None
    assert type(keys.transpose(2, 3)) is torch.Tensor
    assert keys._values is not None
    assert "[1, 2, 3, 8]" in repr(keys).replace("(", "[").replace(")", "]")


def write_where_reserve_says(layer, other, seed):
    """A token of a fused call, which `other` is updated with: both hold the same then."""
    key, value = states(2, 1, seed=seed)
    (keys, values), start = layer.reserve(1)
    keys[:, :, start : start + 1], values[:, :, start : start + 1] = key, value
    layer.commit(1)
    assert_same((keys[:, :, : start + 1], values[:, :, : start + 1]), other.update(key, value))


def test_fused_calls_write_where_reserve_says():
    layer, other = NativeLayer(), NativeLayer()
    assert layer.reserve(1) is None
    for x in (layer, other):
        x.update(*states(2, 70))
    for seed in range(100):
        write_where_reserve_says(layer, other, seed)
    layer.batch_repeat_interleave(2)
    assert layer.reserve(1) is None


def test_fused_calls_see_the_window_only():
    layer, other = layers(8)
    for x in (layer, other):
        x.update(*states(2, 20))
    for seed in range(100):
        write_where_reserve_says(layer, other, seed)
    assert layer.get_mask_sizes(1) == other.get_mask_sizes(1)
    assert layer.reserve(8) is None


def test_reset_frees_everything():
    for layer in (NativeLayer(), SlidingLayer(4)):
        layer.update(*states(2, 9))
        layer.reset()
        assert (layer.nbytes, layer.get_seq_length(), layer.keys, layer.is_initialized) == (0, 0, None, False)
        assert_same(layer.update(*states(3, 2, dtype=torch.bfloat16)), states(3, 2, dtype=torch.bfloat16))


def test_cache_of_transformers_takes_the_layers():
    cache = DynamicCache()
    cache.layers = [NativeLayer(), SlidingLayer(4)]
    cache.update(*states(2, 5), 0)
    cache.update(*states(2, 5), 1)
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (5, 5)
    assert cache.is_sliding == [False, True]
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert len(list(cache)) == 2
    cache.reset()
    assert cache.get_seq_length() == 0


def test_can_be_written_outside_of_inference_mode():
    layer = NativeLayer()
    with torch.inference_mode():
        layer.update(*states(2, 3))
        layer.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        keys, _ = layer.update(*states(2, 100))
    assert keys.shape[2] == 103


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), r"\[B, Hkv, L, D\]"),
        (torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 2, 8), r"\[B, Hkv, L, D\]"),
        (torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), r"expected \[2, 2, L, 8\]"),
        (torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1, 8), r"expected \[2, 2, L, 8\]"),
        (torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 4), r"values: expected \[2, 2, L, 8\]"),
        (torch.zeros(2, 2, 1, 8).double(), torch.zeros(2, 2, 1, 8).double(), "float32, bfloat16 or float16"),
        (torch.zeros(2, 2, 1, 8).half(), torch.zeros(2, 2, 1, 8).half(), "as in what is stored"),
    ],
)
@pytest.mark.parametrize("window", [None, 2])
def test_unfit_states_are_refused_and_change_nothing(window, key, value, message):
    layer, _ = layers(window)
    layer.update(*states(2, 3))
    before = layer.keys.clone()
    with pytest.raises(ValueError, match=message):
        layer.update(key, value)
    assert torch.equal(layer.keys, before)


@pytest.mark.parametrize("window", [None, 2])
def test_gradients_reach_the_tokens_of_a_call_alone(window):
    (layer, _), (plain, _) = layers(window), layers(window)
    earlier, new = states(2, 3), states(2, 3)
    with torch.enable_grad():
        for each in (layer, plain):
            each.update(*earlier)
        leaves = [x.clone().requires_grad_() for x in new]
        got, want = layer.update(*leaves), plain.update(*new)
        for x, leaf, expected in zip(got, leaves, want, strict=True):
            assert torch.equal(x, expected)
            weights = torch.randn(x.shape)
            (x * weights).sum().backward()
            assert torch.equal(leaf.grad, weights[:, :, -3:])
        assert torch.equal(layer.keys, plain.keys)
        with pytest.raises(RuntimeError, match=r"earlier calls.*use_cache=False"):
            layer.update(*leaves)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.uint8, "int8"])
def test_other_storage_is_refused(dtype):
    with pytest.raises(ValueError, match=r"torch\.int8"):
        NativeLayer(dtype)


def test_window_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        SlidingLayer(0)


@pytest.mark.parametrize("length", [1, 30])
def test_channels_with_large_keys_do_not_cost_the_others_their_bits(length):
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 2, 40, 16, generator=generator) for _ in range(2))
    key[:, 0, :, 3] += 300
    key[:, 1, :, 5] -= 200
    layer = NativeLayer(torch.int8)
    layer.update(key[:, :, :length], value[:, :, :length])
    layer.update(key[:, :, length:], value[:, :, length:])
    error = (layer.keys - key).abs()
    large = torch.zeros(2, 16, dtype=torch.bool)
    large[0, 3] = large[1, 5] = True
    assert error.transpose(1, 2)[..., ~large].max() < 0.1
    assert error.transpose(1, 2)[..., large].max() < 5
    query = torch.randn(2, 4, 10, 16, generator=generator)
    query[:, :2, :, 3] /= 300
    query[:, 2:, :, 5] /= 200
    expected = ops.attention(query, key, value, scale=0.25, causal=True)
    torch.testing.assert_close(layer.attention(query, scale=0.25, causal=True), expected, rtol=0.05, atol=0.05)


def test_factors_of_channels():
    key = torch.ones(1, 2, 3, 7)
    key[0, 0, 1, :4] = torch.tensor([1.0, 3.9, 4.1, -900.0])
    key[0, 0, :, 4] = 0
    assert outlier_factors(key).tolist() == [[1, 1, 4, 512, 1, 1, 1], [1] * 7]
    assert outlier_factors(torch.zeros(1, 1, 2, 4)).tolist() == [[1] * 4]
    key[0, 0, 0, 0], key[0, 1, 0, 0] = torch.nan, torch.inf
    factors = outlier_factors(key)
    assert torch.isfinite(factors).all()
    assert (factors >= 1).all()


def error_of_keys(layer, query, keys, values):
    """Of the attention over what `layer` stores, relative to that over `keys` and `values`."""
    expected = ops.attention(query, keys, values, scale=query.shape[-1] ** -0.5)
    return ((layer.attention(query, scale=query.shape[-1] ** -0.5) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lengths", [[1] * 40, [1, 39], [2, 3, 35]])
def test_a_strange_first_token_does_not_choose_the_factors(beams, lengths):
    """As a start token, which other tokens do not look like; decoders of translators begin with nothing else."""
    keys, values = states(1, 40, size=64)
    keys[:, :, 0] *= 0.01
    keys[:, :, 0, 5] = 20
    query = states(beams, 1, heads=4, size=64, seed=1)[0] * 2
    layer, done = NativeLayer(torch.int8), 0
    for length in lengths:
        layer.append(*(x[:, :, done : done + length].expand(layer._batch or 1, -1, -1, -1) for x in (keys, values)))
        if not done:
            layer.batch_repeat_interleave(beams)
        done += length
    repeated = (x.expand(beams, -1, -1, -1) for x in (keys, values))
    assert error_of_keys(layer, query, *repeated) < 0.05


def test_outliers_that_few_tokens_show_are_divided_at_once():
    keys, values = states(1, 40, size=64)
    keys[..., 7] += 300
    query = states(1, 1, heads=4, size=64, seed=1)[0]
    query[..., 7] /= 300
    layer = NativeLayer(torch.int8)
    for i in range(40):
        layer.append(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        assert error_of_keys(layer, query, keys[:, :, : i + 1], values[:, :, : i + 1]) < 0.03


def test_what_was_returned_before_the_factors_changed_keeps_its_values():
    layer = NativeLayer(torch.int8)
    keys, values = states(1, 2, size=64)
    keys[..., 3] = 50
    first, _ = layer.update(keys, values)
    before = layer._factors
    (
        layer.update(*states(1, 3, size=64, seed=1)),
        layer.update(states(1, 3, size=64)[0] * 9, values[:, :, :1].repeat(1, 1, 3, 1)),
    )
    assert not torch.equal(before, layer._factors)
    assert (first - keys).norm() / keys.norm() < 0.01


def test_factors_are_found_anew_after_all_was_cropped():
    keys, values = states(1, 30, size=64)
    layer = NativeLayer(torch.int8)
    layer.append(keys * torch.ones(64).index_fill_(0, torch.tensor([3]), 1e4), values)
    layer.crop(-30)
    layer.append(keys, values)
    assert torch.equal(layer._factors, outlier_factors(keys))


def test_factors_stay_in_float_range():
    keys, values = states(1, 20, size=64)
    keys[..., 1:] *= 1e-38
    layer = NativeLayer(torch.int8)
    layer.append(keys, values)
    assert error_of_keys(layer, states(1, 1, size=64, seed=1)[0] * 1000, keys, values) < 0.03


def test_an_int8_cache_without_sequences():
    layer = NativeLayer(torch.int8)
    for _ in range(2):
        keys, values = layer.update(*states(0, 3))
    assert keys.shape == values.shape == (0, 2, 6, 8)
