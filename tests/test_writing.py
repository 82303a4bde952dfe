import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ipex_quant import writing
from ipex_quant.writing import check_writable, new_directory, replaced_directory, replaced_file, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "directory", "directory-without-exchange"])
def test_after_a_kill_the_old_or_the_new_one_is_there(tmp_path, kind):
    worker = Path(__file__).with_name("killed_writer.py")
    command = [sys.executable, worker, writing.__file__, tmp_path, kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    seen = [tuple(each) for each in json.loads(result.stdout)]
    assert {(True, "old"), (True, "new"), (False, "nothing"), (False, "new")} <= set(seen)
    between = {(True, "nothing")} if kind == "directory-without-exchange" else set()
    assert set(seen) <= {(True, "old"), (True, "new"), (False, "nothing"), (False, "new")} | between


def test_what_a_kill_between_two_renames_left_is_put_back(tmp_path):
    left = tmp_path / ".target-0123456789abcdef0123456789ab.tmp"
    (left / "old").mkdir(parents=True)
    (left / "old" / "a").write_text("old")
    with pytest.raises(KeyError), replaced_directory(tmp_path / "target"):
        raise KeyError
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "a").read_text() == "old"


def make(folder):
    folder.mkdir()
    return folder


class TestFiles:
    def test_text_and_bytes(self, tmp_path):
        for content in ("ä", b"\xff"):
            write_whole(tmp_path / "file", content)
            expected = content.encode() if isinstance(content, str) else content
            assert (tmp_path / "file").read_bytes() == expected
        assert names(tmp_path) == ["file"]

    def test_an_error_leaves_the_old_one(self, tmp_path):
        write_whole(tmp_path / "file", "old")
        with pytest.raises(TypeError), replaced_file(tmp_path / "file") as file:
            file.writelines([b"new", None])
        assert (tmp_path / "file").read_text() == "old"
        assert names(tmp_path) == ["file"]

    def test_rights_are_those_of_the_umask(self, tmp_path):
        before = os.umask(0o027)
        try:
            write_whole(tmp_path / "file", "")
            with new_directory(tmp_path / "directory", "out"):
                pass
        finally:
            os.umask(before)
        assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "directory")] == [0o640, 0o750]

    def test_links_at_foreseeable_names_are_not_followed(self, tmp_path):
        (tmp_path / "precious").write_text("precious")
        for name in ("file.tmp", ".file.tmp", f".file.{os.getpid()}.tmp"):
            (tmp_path / name).symlink_to("precious")
        write_whole(tmp_path / "file", "new")
        assert (tmp_path / "precious").read_text() == "precious"
        assert not (tmp_path / "file").is_symlink()

    def test_one_that_is_being_written_is_not_swept(self, tmp_path):
        with replaced_file(tmp_path / "file") as file:
            write_whole(tmp_path / "file", "of another writer")
            file.write(b"mine")
        assert (tmp_path / "file").read_text() == "mine"

    def test_what_cannot_be_written_is_told_before_the_work(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            check_writable(tmp_path / "none" / "file")
        with pytest.raises(IsADirectoryError):
            check_writable(tmp_path)
        check_writable(tmp_path / "file")
        assert names(tmp_path) == []


class TestNewDirectories:
    def test_parents_are_made(self, tmp_path):
        with new_directory(tmp_path / "a" / "b", "out") as staging:
            (staging / "file").touch()
        assert names(tmp_path / "a") == ["b"]
        assert names(tmp_path / "a" / "b") == ["file"]

    def test_one_that_exists_is_refused_at_once(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
        for path in (tmp_path / "out", tmp_path / "out" / "file"):
            with pytest.raises(ValueError, match=r"--out: .* exists and is not empty"), new_directory(path, "--out"):
                pytest.fail("it must not begin")

    def test_a_second_writer_is_refused_at_once(self, tmp_path):
        out = tmp_path / "out"
        with new_directory(out, "--out") as staging:
            (staging / "mine").touch()
            with pytest.raises(ValueError, match="another process is writing"), new_directory(out, "--out"):
                pytest.fail("it must not begin")
        assert names(out) == ["mine"]

    def test_one_that_appeared_meanwhile_stays(self, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match=r"another process wrote .* meanwhile"), new_directory(out, "--out"):
            write_whole(make(out) / "theirs", "")
        assert names(tmp_path) == ["out"]
        assert names(out) == ["theirs"]


class TestReplacedDirectories:
    def test_other_files_stay_and_stale_ones_go(self, tmp_path):
        old = tmp_path / "out"
        (old / "sub" / "deep").mkdir(parents=True)
        for name in ("a", "model-1.bin", "sub/deep/file"):
            (old / name).write_text("old")
        (old / "link").symlink_to("../elsewhere")
        with replaced_directory(old, stale=("model*.bin",)) as staging:
            (staging / "a").write_text("new")
        assert names(old) == ["a", "link", "sub"]
        assert (old / "a").read_text() == "new"
        assert (old / "sub" / "deep" / "file").read_text() == "old"
        assert os.readlink(old / "link") == "../elsewhere"
        assert names(tmp_path) == ["out"]

    def test_a_link_to_a_directory_stays_one(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "file").touch()
        (tmp_path / "link").symlink_to("real")
        with replaced_directory(tmp_path / "link") as staging:
            (staging / "new").touch()
        assert (tmp_path / "link").is_symlink()
        assert names(tmp_path / "real") == ["file", "new"]

    def test_nested_ones_are_one(self, tmp_path):
        with new_directory(tmp_path / "out", "out") as outer, replaced_directory(outer) as inner:
            (inner / "file").touch()
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out") == ["file"]

    def test_threads_do_not_end_in_each_others_way(self, tmp_path):
        errors = []

        def work(number):
            try:
                for _ in range(20):
                    with replaced_directory(tmp_path / "out") as staging:
                        for name in "abc":
                            (staging / name).write_text(str(number))
                    write_whole(tmp_path / "file", str(number))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert names(tmp_path) == ["file", "out"]
        assert len({(tmp_path / "out" / name).read_text() for name in "abc"}) == 1

    def test_a_file_is_none(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError), replaced_directory(tmp_path / "file"):
            pytest.fail("it must not begin")
        with pytest.raises(OSError, match="mount point"), replaced_directory("/proc"):
            pytest.fail("it must not begin")
