"""`local_path` on a cache of the hub that is made here; nothing is downloaded."""

import shutil

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

import ipex_quant as ipex
from ipex_quant import cli
from ipex_quant.llm.saved import repositories
from ipex_quant.llm.saved.repositories import Source, local_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """`cached(id, files)` puts a directory into the cache as ``snapshot_download`` does."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(name, directory, revision="main"):
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(COMMIT)
        snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for index, file in enumerate(sorted(directory.iterdir())):
            shutil.copy(file, blobs / str(index))
            (snapshot / file.name).symlink_to(blobs / str(index))
        return snapshot

    put.cache = cache
    return put


@pytest.fixture
def saved(llama, tmp_path):
    llama.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_model_in_the_cache_is_found_by_its_id(saved, cached, logits, capsys):
    snapshot = cached("someone/model", saved)
    assert local_path("someone/model") == snapshot
    assert local_path("someone/model", Source("main", cache_dir=cached.cache, local_files_only=True)) == snapshot
    assert local_path("someone/model", Source(COMMIT)) == snapshot
    model = ipex.llm.from_pretrained("someone/model", torch.float32, revision="main")
    assert torch.equal(logits(model), logits(ipex.llm.from_pretrained(saved, torch.float32)))
    assert cli.main(["explain", "someone/model", "--revision", "main"]) == 0
    assert "lm_head" in capsys.readouterr().out


def test_a_directory_comes_before_an_id(saved, cached, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert str(local_path("llama")) == "llama"
    with pytest.raises(ValueError, match="revision: llama is a path here, which has none"):
        local_path("llama", Source("main"))


@pytest.mark.parametrize("source", [Source(), Source("v2"), Source(local_files_only=True)])
def test_offline_a_model_must_be_in_the_cache(saved, cached, source, capsys):
    if source.revision:
        cached("someone/model", saved)
    with pytest.raises(OSError, match=r"someone/model: no such directory, and the cache of the hub does not have the"):
        local_path("someone/model", source)
    assert cli.main(["generate", "no/model", "--prompt", "a"]) == 2
    assert "no/model: no such directory, and the cache of the hub" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/no/model", "./model", "~/model", "../a/b", "model/"])
def test_what_looks_like_a_path_is_one(name):
    with pytest.raises(ValueError, match=r"expected a directory with a config\.json, and there is none"):
        local_path(name)


@pytest.mark.parametrize("name", ["a/b/c", "a b", "x" * 200])
def test_what_is_no_id_is_refused(name):
    with pytest.raises(ValueError, match="expected a directory, or the id of a repository"):
        local_path(name)


def test_gguf_files(tmp_path, cached):
    files = tmp_path / "files"
    files.mkdir()
    (files / "one.gguf").write_bytes(b"1")
    snapshot = cached("a/single", files)
    assert local_path("a/single") == snapshot / "one.gguf"
    (files / "two.gguf").write_bytes(b"2")
    snapshot = cached("a/several", files)
    assert local_path("a/several", Source(filename="two.gguf")) == snapshot / "two.gguf"
    with pytest.raises(ValueError, match=r"a/several: the repository has several GGUF files, one.gguf, two.gguf; say"):
        local_path("a/several")
    with pytest.raises(ValueError, match=r"filename: .* has no file three.gguf; its GGUF files are \['one.gguf', 'two"):
        local_path("a/several", Source(filename="three.gguf"))
    with pytest.raises(ValueError, match=r"filename: expected a file beside the configuration, got '\.\./one.gguf'"):
        local_path("a/several", Source(filename="../one.gguf"))
    assert local_path(files, Source(filename="one.gguf")) == files / "one.gguf"


def test_a_repository_without_weights(tmp_path, cached):
    files = tmp_path / "files"
    files.mkdir()
    (files / "config.json").write_text("{}")
    cached("a/empty", files)
    with pytest.raises(ValueError, match="a/empty: the repository has no weights"):
        local_path("a/empty")


def test_code_is_downloaded_where_it_is_trusted_only(monkeypatch, tmp_path):
    asked = []

    def download(name, allow_patterns, **_):
        asked.append(allow_patterns)
        return tmp_path

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(repositories, "snapshot_download", download)
    for trusted in (False, True):
        local_path("a/b", trust_remote_code=trusted)
    assert ["*.py" in patterns for patterns in asked] == [False, True]
    assert all("*.bin" not in patterns for patterns in asked)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "its owner gives access on request"),
        (RevisionNotFoundError, "revision: a/b has no 'v3' on the hub"),
        (RepositoryNotFoundError, "no such directory, and no such model on the hub for this account"),
    ],
)
def test_what_the_hub_answers(monkeypatch, error, message):
    def download(*_, **__):
        raise error.__new__(error)

    monkeypatch.setattr(repositories, "snapshot_download", download)
    with pytest.raises(ValueError, match=message):
        local_path("a/b", Source("v3"))
