import pytest

from ipex_quant.reading import read_json, shown


def test_objects_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"ä": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"3", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16")),
        *(b"[" * 300000, b'{"a":' * 300000, b"[" * 300000 + b"]" * 300000, b'{"a": ' + b"9" * 5000 + b"}"),
    ],
    ids=lambda content: repr(content[:8]),
)
def test_everything_else_is_a_short_value_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: ") as raised:
        read_json(tmp_path / "a.json")
    assert len(str(raised.value)) < 500


def test_values_are_shown_in_short():
    deep = []
    for _ in range(10000):
        deep = [deep]
    for value in ("x" * 10**6, list(range(10**6)), deep, {"a": deep}, 10**4000, {i: i for i in range(1000)}):
        assert len(shown(value)) < 500
    assert shown("short") == "'short'"
