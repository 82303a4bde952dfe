import dataclasses
import math

import pytest

from ipex_quant import demo
from ipex_quant.evaluation import Comparison
from ipex_quant.recipes.recipe import load_recipe

GOOD_TEXT = "The following statement " + "is a word " * 10


RESULT = Comparison(
    reference_perplexity=20.0,
    perplexity=20.0,
    kl_divergence=0.001,
    kl_99th_percentile=0.01,
    kl_largest=0.1,
    top1_agreement=0.99,
    tokens=1000,
)
GOOD = demo.Row(
    label="",
    recipe="",
    bytes=400,
    comparison=RESULT,
    tokens_per_second=100.0,
    linears=43,
    float_linears=0,
    reloads_bit_equal=True,
    cache_bytes=1000,
)


def changed(row, **changes):
    of_result = {name: changes.pop(name) for name in list(changes) if hasattr(RESULT, name)}
    return dataclasses.replace(row, comparison=dataclasses.replace(row.comparison, **of_result), **changes)


def row(label, **changes):
    return changed(GOOD, label=label, **changes)


@pytest.fixture
def rows():
    labels = ("float32", "bfloat16", *demo.VARIANTS)
    found = {label: row(label) for label in labels}
    found["bfloat16"] = row("bfloat16", bytes=1000)
    found["INT8 cache"] = row("INT8 cache", cache_bytes=530)
    found["INT4 RTN"] = row("INT4 RTN", kl_divergence=0.002)
    return found


def failures(rows, text=GOOD_TEXT):
    return [check.name for check in demo.checks(rows, text) if not check.passed]


def test_good_measurements_pass(rows):
    assert failures(rows) == []


@pytest.mark.parametrize("label", demo.VARIANTS)
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"linears": 0}, "something is quantized"),
        ({"float_linears": 1}, "no linear module stays in float (1 do)"),
        ({"bytes": 900}, "size is 0.90 of bfloat16's"),
        ({"perplexity": 30.0}, "perplexity is 1.500 of float32's"),
        ({"perplexity": math.nan}, "perplexity is nan"),
        ({"top1_agreement": 0.5}, "top-1 agreement is 0.500"),
        ({"reloads_bit_equal": False}, "saved and loaded again it is bit-equal"),
    ],
)
def test_each_defect_fails_its_own_check(rows, label, changes, name):
    rows[label] = changed(rows[label], **changes)
    (failed,) = failures(rows)
    assert failed.startswith(f"{label}: {name}")


@pytest.mark.parametrize("divergence", [1.0, math.nan])
def test_a_large_divergence_fails(rows, divergence):
    rows["NF4"] = row("NF4", kl_divergence=divergence)
    (failed,) = failures(rows)
    assert failed.startswith("NF4: KL divergence is")


@pytest.mark.parametrize("divergence", [0.002, 0.003])
def test_gptq_must_beat_rtn(rows, divergence):
    rows["INT4 GPTQ"] = row("INT4 GPTQ", kl_divergence=divergence)
    (failed,) = failures(rows)
    assert failed.startswith("INT4 GPTQ diverges less than INT4 RTN")


@pytest.mark.parametrize("size", [600, 1000])
def test_an_int8_cache_must_be_small(rows, size):
    rows["INT8 cache"] = row("INT8 cache", cache_bytes=size)
    (failed,) = failures(rows)
    assert failed.startswith(f"the INT8 cache is {size / 1000:.2f} of the bfloat16 one")


def test_speed_is_told_beside_stock_transformers(rows):
    rows["INT4 RTN"] = row("INT4 RTN", tokens_per_second=250.0)
    assert demo.speedup(rows) == 2.5


def test_an_empty_text_fails(rows):
    (failed,) = failures(rows, text="The end")
    assert failed == "at least 10 words are generated: 'The end'"


def test_table_line_fits_the_head(rows):
    assert demo.table_line(rows["float32"]).split() == [
        "float32",
        "(float)",
        "0.00",
        "20.000",
        "0.0010",
        "99.0%",
        "100",
    ]
    assert {len(demo.table_line(row)) for row in rows.values()} == {len(demo.TABLE_HEAD)}


@pytest.mark.parametrize("label", demo.VARIANTS)
def test_variants_name_packaged_recipes(label):
    assert load_recipe(demo.VARIANTS[label].recipe)
