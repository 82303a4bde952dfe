import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipex_quant.checkpoints.patterns import Pattern

NAME = "model.layers.18.mlp.experts.3.gate_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.18\..*(?:gate|up)",
        r"model\.layers\.(\d+)\.mlp",
        r"^(?!.*\.(1|2)\.).*proj$",
        r"(?=model)(?P<a>.)o",
        "lm_head",
        r"[^.]+\.layers\.[0-9]{1,2}\.",
        r"[]m]odel",
        r".{39}$",
        r".{40}",
        "",
        "x|",
        "x*?m+",
        "{m}",
        r"\bmodel\b\.\blayers",
        r"\x6dodel",
    ],
)
@pytest.mark.parametrize("text", [NAME, "lm_head", "", "model.layers.1.mlp", "{m}", "xxm"])
def test_what_python_matches(pattern, text):
    assert Pattern(pattern).matches(text) == bool(re.match(pattern, text))


_ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", "^", "$", r"\b", r"\.", ""])
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(["(%s)", "(?:%s)", "(?=%s)", "(?!%s)"]), inner).map(lambda pair: pair[0] % pair[1]),
        st.tuples(inner, st.sampled_from(["*", "+?", "?", "{2}", "{0,2}", "{,3}", "{1,}?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@given(_PATTERNS, st.text("ab.", max_size=6))
def test_agrees_with_python(pattern, text):
    assert Pattern(pattern).matches(text) == bool(re.match(pattern, text))


@pytest.mark.parametrize("pattern", ["(([a-z_0-9]+)+\\.?)+!", "(a|a)*!", "(.*)*" * 4 + "!", "(?!(.*)*!)x"])
def test_patterns_that_python_does_not_end_with(pattern):
    assert not Pattern(pattern).matches("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("pattern", ["(.*)*" * 150 + "!", "(?:(?:(?:.*){1,99}){1,999999999}){5}!"])
def test_a_match_ends_after_so_many_steps(pattern):
    with pytest.raises(ValueError, match="takes more than 100000 steps"):
        Pattern(pattern).matches("model.layers.0.self_attn.q_proj" * 40)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "not a regular expression"),
        ("(" * 400 + ")" * 400, "not a regular expression|not supported"),
        (r"(a)\1", r"\\\\1.* is not supported"),
        ("(?<=a)b", "is not supported"),
        ("(?i)a", "is not supported"),
        ("a" * 1001, "1001 characters, expected at most 1000"),
        ("a{99999999999999999999}", "not a regular expression"),
    ],
)
def test_others_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        Pattern(pattern)
