"""Where a model's files come from: folders, and a Hub that is asked as little as can be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import COMMIT, Hub
from tandem.core.checkpoint import model_folder, model_name, repository_of
from tandem.core.config import load_config

_FETCH = """
import sys
from tandem.core.checkpoint import model_folder, pinned
from tandem.core.config import load_config
from tandem.core.errors import ConfigError
try:
    config = pinned(load_config(None, [f"model.path={sys.argv[1]}"]))
    print(config.model.path)
    print(model_folder(config, weights="weights" in sys.argv, progress=lambda what, done: print(what, done)))
except ConfigError as error:
    print(error.message, "|", error.fix)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "model.safetensors").write_bytes(b"w" * (1 << 20))
    (folder / "pytorch_model.bin").write_bytes(b"b" * (1 << 20))
    (folder / "consolidated.safetensors").write_bytes(b"c" * (1 << 20))
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with Hub("maker/model", repository) as hub:
        yield hub


def fetch(home: Path, hub: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process, as the Hub's library reads its settings once."""
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": hub, "HF_HUB_ETAG_TIMEOUT": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", _FETCH, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_repository_is_fetched_once_a_node(tmp_path: Path, hub: Hub) -> None:
    processes = [fetch(tmp_path, hub.url, "maker/model", "weights") for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    for output in outputs:
        assert output[0] == f"maker/model@{COMMIT}"
        folder = Path(output[-1])
        assert folder.is_relative_to(tmp_path)
        assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
        assert (folder / "model.safetensors").stat().st_size == 1 << 20
    assert set(hub.fetched) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert hub.fetched["model.safetensors"] == 1, "whoever comes while another fetches waits"
    assert "fetching maker/model 1.0" in [line for output in outputs for line in output]


def test_what_is_there_needs_no_hub_and_metadata_is_little(tmp_path: Path, hub: Hub) -> None:
    process = fetch(tmp_path, hub.url, "maker/model")
    assert process.communicate(timeout=60)[0].startswith("maker/model@")
    assert hub.fetched == {"config.json": 1, "tokenizer.json": 1}
    process = fetch(tmp_path, hub.url, f"maker/model@{COMMIT}", "weights")
    assert "model.safetensors" in os.listdir(process.communicate(timeout=60)[0].splitlines()[-1])
    away = fetch(tmp_path, "http://127.0.0.1:9", f"maker/model@{COMMIT}", "weights")
    assert "model.safetensors" in os.listdir(away.communicate(timeout=60)[0].splitlines()[-1])


@pytest.mark.parametrize(
    ("path", "url", "found"),
    [
        ("maker/other", "", "the Hub has no such repository, or not for you | check the name; set HF_TOKEN"),
        ("maker/model@v9", "", "it has no revision v9 | give a branch, a tag or a commit after the @"),
        ("maker/model", "http://127.0.0.1:9", "it could not be fetched: "),
    ],
)
def test_what_cannot_be_fetched_says_why(tmp_path: Path, hub: Hub, path: str, url: str, found: str) -> None:
    output = fetch(tmp_path, url or hub.url, path).communicate(timeout=60)[0]
    name = path.partition("@")[0]
    assert output.startswith(f"model.path: there is no folder {name}, and of the Hub's repository {name}: {found}")


def test_a_folder_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["model.path=models/mine"])
    assert repository_of(config) is None
    assert model_folder(config) == Path("models/mine")
    assert model_name(config) == "mine"
    other = load_config(None, ["model.path=models/yours@main"])
    assert repository_of(other) == ("models/yours", "main")
    assert model_name(other) == "models/yours"
    for path in ("demo", "/nowhere", "./a/b", "~/a", "a/b/c", "../a"):
        assert repository_of(load_config(None, [f"model.path={path}"])) is None
