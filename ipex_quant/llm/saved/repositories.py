"""`local_path`: the directory of a model, which is downloaded if it is in a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.yaml")
"""Patterns of configurations and tokenizers."""

WEIGHT_FILES = (("*.safetensors",), ("*.bin", "*.pt", "*.pth"))
"""Patterns of weights; the first that a repository has are downloaded."""

OTHERS = ("*/*", "consolidated*", "*.index.json.*")
"""Patterns of what is never downloaded: files in folders, and the weights of other frameworks."""


@dataclass(frozen=True)
class Source:
    """Where in the hub, and how, a model is looked for.

    `revision` is a branch, tag or commit; `token` one of the hub, None for that of the environment or of its login.
    `cache_dir` is the hub's cache if None. With `local_files_only`, or HF_HUB_OFFLINE in the environment, nothing is
    downloaded. `filename` is one GGUF file, where a repository or directory has several.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    filename: str | None = None


def local_path(
    directory_or_id: str | os.PathLike, source: Source | None = None, trust_remote_code: bool = False
) -> Path:
    """The path `directory_or_id`, if it exists, else that of the repository with this id, downloaded to the cache.

    With a `filename` in `source` it is that of the file. Code is downloaded with `trust_remote_code` only. Raises
    ValueError for what is neither a path nor an id, for a repository, revision or file that is not there, or not
    allowed, and OSError where the hub cannot be reached and the cache does not have the repository.
    """
    source = source or Source()
    if source.filename is not None and Path(source.filename).name != source.filename:
        raise ValueError(f"filename: expected a file beside the configuration, got {source.filename!r}")
    path = Path(directory_or_id)
    if path.exists():
        if source.revision is not None:
            raise ValueError(f"revision: {path} is a path here, which has none; leave it out")
        return path if source.filename is None else _file(path, source.filename)
    name = _repository(directory_or_id)
    if source.filename is not None:
        return _file(_download(name, source, (*SMALL_FILES, source.filename)), source.filename)
    small = (*SMALL_FILES, *("*.py",) * trust_remote_code)
    for weights in WEIGHT_FILES:
        found = _download(name, source, (*small, *weights))
        if any(file for pattern in weights for file in found.glob(pattern)):
            return found
    files = sorted(file for file in _listed(name, source, found) if file.endswith(".gguf") and "/" not in file)
    if len(files) == 1:
        return _file(_download(name, source, (*small, files[0])), files[0])
    what = f"several GGUF files, {', '.join(files)}; say which by filename" if files else "no weights"
    raise ValueError(f"{name}: the repository has {what}")


def _repository(name: str | os.PathLike) -> str:
    """`name` if it can be the id of a repository; ValueError for anything else."""
    text = str(name)
    if Path(text).is_absolute() or text.startswith((".", "~")) or "\\" in text or text.endswith("/"):
        raise ValueError(f"{text}: expected a directory with a config.json, and there is none")
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ValueError(f"{text}: expected a directory, or the id of a repository as in organization/name") from error
    return text


def _file(directory: Path, name: str) -> Path:
    if not (directory / name).is_file():
        found = sorted(file.name for file in directory.glob("*.gguf"))
        raise ValueError(f"filename: {directory} has no file {name}; its GGUF files are {found or 'none'}")
    return directory / name


def _download(name: str, source: Source, patterns: tuple[str, ...]) -> Path:
    ignored = [pattern for pattern in OTHERS if pattern not in patterns]
    at = "" if source.revision is None else f" at revision {source.revision!r}"
    try:
        return Path(
            snapshot_download(
                name,
                revision=source.revision,
                cache_dir=None if source.cache_dir is None else Path(source.cache_dir),
                token=source.token,
                local_files_only=source.local_files_only,
                allow_patterns=list(patterns),
                ignore_patterns=ignored,
            )
        )
    except GatedRepoError as error:
        raise ValueError(
            f"{name}: its owner gives access on request; ask for it on the hub's page of the model, and give the token "
            "of your account (HF_TOKEN, or `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"revision: {name} has no {source.revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: no such directory, and no such model on the hub for this account; a private one needs a token "
            "(HF_TOKEN, or `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise OSError(
            f"{name}: no such directory, and the cache of the hub does not have the model{at}; it could not be "
            f"downloaded: offline, or the hub cannot be reached ({error})"
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"{name}: the hub refused the download ({error})") from error


def _listed(name: str, source: Source, snapshot: Path) -> list[str]:
    """Names of the files of a repository; those in the `snapshot` where the hub cannot be asked."""
    if not source.local_files_only:
        try:
            return HfApi(token=source.token).list_repo_files(name, revision=source.revision)
        except OSError:  # offline; the download that went before was answered by the cache
            pass
    return [file.name for file in snapshot.iterdir()]
