"""Where a model's files are: in a folder, with Tandem (the demo model), or in a repository of the Hugging Face Hub.

A repository is fetched into the node's own cache (HF_HOME), once for all processes of the node: who comes while
another fetches waits for it. A launch pins the commit, such that all nodes, and every later life of a worker, read the
same files; what is pinned and complete needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .config import DEMO_MODEL, Config
from .errors import ConfigError

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_METADATA = ["*.json", "*.txt", "*.jinja", "*.model"]
"""Configuration and tokenizer."""
_WEIGHTS = ["*.safetensors"]
_UNREAD = ["*/*", "consolidated*"]
"""Copies in other formats."""

Progress = Callable[[str, float], None]
"""Called with what is done, for people, and how much of it."""


class Repository(NamedTuple):
    """A repository of the Hub at a revision: a branch, a tag or a commit."""

    name: str
    revision: str


def repository_of(config: Config) -> Repository | None:
    """The repository that ``model.path`` names, as in "Qwen/Qwen3-8B@main"; None: it names a folder."""
    name, _, revision = config.model.path.partition("@")
    if not _REPOSITORY.fullmatch(name) or Path(config.model.path).exists():
        return None
    return Repository(name, revision or "main")


def model_folder(config: Config, *, weights: bool = False, progress: Progress = lambda what, done: None) -> Path:
    """Where the model's files are. Blocks, for as long as they have to be fetched.

    Args:
        config: ``model.path`` counts, with ``~`` expanded.
        weights: of a repository, not only configuration and tokenizer are wanted.
        progress: told how the fetching goes on.

    Raises:
        ConfigError: the folder, or its config.json, is not there, or the repository cannot be fetched.
    """
    repository = repository_of(config)
    if repository is not None:
        folder = _fetch(repository, [*_METADATA, *(_WEIGHTS if weights else ())], progress)
    elif config.model.path == DEMO_MODEL:
        folder = Path(__file__).resolve().parent.parent / "deploy" / "demo-model"
    else:
        folder = Path(config.model.path).expanduser()
    if not (folder / "config.json").is_file():
        found = "the folder does not exist" if not folder.is_dir() else "it has no config.json"
        raise ConfigError(
            f"model.path: {folder}: {found}",
            fix="give a checkpoint folder or a Hub repository (organisation/name) in Hugging Face format, "
            f'or "{DEMO_MODEL}"',
        )
    return folder


def model_name(config: Config) -> str:
    """The name under which the gateway serves the model."""
    if config.model.name:
        return config.model.name
    repository = repository_of(config)
    if repository is not None:
        return repository.name
    return "tandem-demo" if config.model.path == DEMO_MODEL else model_folder(config).resolve().name


def pinned(config: Config) -> Config:
    """The same configuration, with a repository's revision made a commit. Blocks while configuration and tokenizer are
    fetched.

    Raises:
        ConfigError: as `model_folder`.
    """
    repository = repository_of(config)
    if repository is None:
        return config
    commit = model_folder(config).name
    model = config.model.model_copy(update={"path": f"{repository.name}@{commit}"})
    return config.model_copy(update={"model": model})


def _fetch(repository: Repository, patterns: list[str], progress: Progress) -> Path:
    """Bring a repository's files into the node's cache; returns their folder, which is named after the commit."""
    # A quarter of a second, for those alone who read from the Hub.
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = repository
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_UNREAD,
                tqdm_class=_bar(f"fetching {name}", progress),
            )
        )
    except GatedRepoError:
        found, fix = "its owner wants to be asked first", "ask there, and set HF_TOKEN on every node"
    except RepositoryNotFoundError:
        found, fix = "the Hub has no such repository, or not for you", "check the name; set HF_TOKEN on every node"
    except RevisionNotFoundError:
        found, fix = f"it has no revision {revision}", "give a branch, a tag or a commit after the @"
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:  # the cache's disk is among them
        found = f"it could not be fetched: {' '.join(str(error).split())[:400]}"
        fix = "set HF_ENDPOINT to a mirror that this node reaches, or give a folder that has the files"
    raise ConfigError(f"model.path: there is no folder {name}, and of the Hub's repository {name}: {found}", fix=fix)


def _bar(what: str, progress: Progress) -> type[Any]:
    """What the Hub's library takes for a progress bar: it prints nothing, and tells of bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes and self.total:
                progress(what, min(1.0, self.n / self.total))

    return Bar
