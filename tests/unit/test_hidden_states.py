"""Hidden states of prompts: equal to transformers', whole or not there, and never in anybody's way."""

from __future__ import annotations

import platform
import threading
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from support.checkpoints import FAMILIES, make_checkpoint
from support.pair import Pair
from tandem.core.config import Config
from tandem.core.errors import CapacityError, ConfigError, RequestError
from tandem.core.messages import Child, Generate, Prefilled, Sampling, Stopping, decode, encode
from tandem.kv_transfer.hidden_states import HiddenStateWriter

NAME = "0123456789abcdef0123456789abcdef"
PROMPT = [(11 * i) % 131 for i in range(100)]
LAYERS = [1, 0]


class Folder:
    """A writer's folder, and what became of its files."""

    def __init__(self, path: Path, max_queued_bytes: int = 1 << 20, dtype: torch.dtype = torch.float32) -> None:
        self.path = path
        self.ended: list[str] = []
        self.writer = HiddenStateWriter(path, [3, 7], 5, dtype, max_queued_bytes, self.ended.append)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_is_what_was_recorded_in_pieces(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = Folder(tmp_path / "a" / "b", dtype=dtype)
    tokens = list(range(100, 111))
    states = torch.randn(11, 2, 5).to(dtype)
    recording = folder.writer.record(NAME, tokens)
    recording.append(0, states[:4])
    recording.append(2, states[2:5])  # after a preemption the beginning comes again
    recording.append(5, states[5:])
    recording.close()
    folder.writer.close()
    assert folder.names() == [f"{NAME}.safetensors"]
    found = load_file(folder.path / f"{NAME}.safetensors")
    assert found["token_ids"].tolist() == tokens
    assert torch.equal(found["hidden_states"], states)
    with safe_open(folder.path / f"{NAME}.safetensors", "pt") as file:
        assert file.metadata() == {"layers": "3,7"}
    assert folder.ended == ["written"]
    assert folder.writer.queued_bytes == 0


def test_what_is_not_whole_is_not_there(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    begun, untouched, still_open = (folder.writer.record(f"{NAME[:-1]}{i}", [1, 2, 3]) for i in range(3))
    begun.append(0, torch.zeros(2, 2, 5))
    begun.close()
    begun.append(2, torch.zeros(1, 2, 5))
    untouched.close()
    still_open.append(0, torch.zeros(1, 2, 5))
    folder.writer.close()
    assert folder.names() == []
    assert folder.ended == ["dropped", "dropped"]


def test_room_is_given_for_whole_prompts_and_comes_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path, max_queued_bytes=10 * 40)
    with pytest.raises(RequestError, match="max_queued"):
        folder.writer.record(NAME, [0] * 11)
    first = folder.writer.record(NAME, [0] * 6)
    with pytest.raises(CapacityError, match="wait for the disk"):
        folder.writer.record(NAME, [0] * 5)
    first.append(0, torch.zeros(2, 2, 5))
    first.close()
    folder.writer.close()
    assert folder.writer.queued_bytes == 0


def test_a_disk_that_fails_costs_the_file_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    lost = folder.writer.record(NAME, [1, 2])
    lost.append(0, torch.zeros(1, 2, 5))
    lost.append(1, torch.zeros(1, 2, 5))
    deadline = threading.Event()
    while "failed" not in folder.ended:
        assert not deadline.wait(0.01)
    (tmp_path / "gone").mkdir()
    folder.writer.record(NAME, [1]).append(0, torch.zeros(1, 2, 5))
    folder.writer.close()
    assert folder.names() == [f"{NAME}.safetensors"]
    assert folder.ended == ["failed", "written"]
    assert folder.writer.queued_bytes == 0


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    Folder(tmp_path).writer.close()
    mark = f".partial-{platform.node()}"
    for name in (f".{NAME}{mark}-99999999", f".{NAME}{mark}-1", f".{NAME}.partial-elsewhere-99999999", "other"):
        (tmp_path / name).touch()
    folder = Folder(tmp_path)
    folder.writer.close()
    assert folder.names() == [f".{NAME}.partial-elsewhere-99999999", f".{NAME}{mark}-1", "other"]


def test_a_folder_that_cannot_be_written_to_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"hidden_states\.folder"):
        Folder(tmp_path / "file")


# ---- through workers ------------------------------------------------------------------------------------------------


class Subject:
    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        self.model: transformers.PreTrainedModel = make_checkpoint(family, folder / "model")

    def pair(self, folder: Path, overlap: bool = False, **sections: object) -> Pair:
        base: dict[str, object] = {
            "model": {"path": str(self.folder / "model"), "max_model_len": 256},
            "kv": {"block_tokens": 8, "capacity": "4MiB"},
            "routing": {"local_prefill": "never"},
            "hidden_states": {"folder": str(folder), "layers": LAYERS},
        }
        return Pair(Config.model_validate(base | sections), overlap)

    def check(self, pair: Pair, folder: Path, prompt: list[int] = PROMPT) -> None:
        for node in pair.nodes.values():
            node.check_idle()
            assert node.writer is not None
            node.writer.close()
            assert node.writer.queued_bytes == 0
        pair.close()
        assert [entry.name for entry in folder.iterdir()] == [f"{NAME}.safetensors"]
        found = load_file(folder / f"{NAME}.safetensors")
        with torch.inference_mode():
            want = self.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        assert found["token_ids"].tolist() == prompt
        for index, layer in enumerate(LAYERS):
            torch.testing.assert_close(found["hidden_states"][:, index], want[layer + 1][0], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_what_transformers_computes(family: str, tmp_path: Path) -> None:
    subject = Subject(family, tmp_path)
    pair = subject.pair(tmp_path / "out", pools={"prefill": {"max_batched_tokens": 33}})
    first = pair.submit(PROMPT)  # the same prompt is in the cache, and is computed again all the same
    pair.run()
    second = pair.submit(PROMPT, hidden_states=NAME, seeds=[1, 2])
    pair.run()
    assert pair.outputs[first].tokens[0] == pair.outputs[second].tokens[0]
    subject.check(pair, tmp_path / "out")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk", [16, 64])
def test_computed_beside_outputs(subject: Subject, tmp_path: Path, chunk: int, overlap: bool) -> None:
    pools = {"colocated": {"max_batched_tokens": chunk, "max_running": 4}}
    pair = subject.pair(tmp_path / "out", overlap, pools=pools)
    pair.submit(PROMPT[:9], max_tokens=40)
    for _ in range(5):
        pair.turn()
    pair.submit(PROMPT, hidden_states=NAME)
    pair.submit(PROMPT[20:60])
    pair.run()
    subject.check(pair, tmp_path / "out")


def test_a_replay_records_the_prompt_and_not_the_output(subject: Subject, tmp_path: Path) -> None:
    pair = subject.pair(tmp_path / "out")
    pair.submit([*PROMPT, 5, 6, 7], num_prompt_tokens=len(PROMPT), hidden_states=NAME)
    pair.run()
    subject.check(pair, tmp_path / "out")


def test_a_prompt_of_one_token(subject: Subject, tmp_path: Path) -> None:
    pair = subject.pair(tmp_path / "out")
    pair.submit(PROMPT[:1], hidden_states=NAME)
    pair.run()
    subject.check(pair, tmp_path / "out", PROMPT[:1])


def test_computed_again_from_the_start_when_a_load_fails(subject: Subject, tmp_path: Path) -> None:
    pair = subject.pair(tmp_path / "out", pools={"prefill": {"max_batched_tokens": 32}, "decode": {}})
    pair.deliver = lambda sender, to, message: not isinstance(message, Prefilled)
    pair.submit(PROMPT, hidden_states=NAME)
    pair.run()
    writer = pair.prefill.writer
    assert writer is not None
    pair.remove("prefill-0#1")
    writer.close()
    (tmp_path / "out" / f"{NAME}.safetensors").unlink()
    pair.run()
    subject.check(pair, tmp_path / "out")


def test_an_aborted_request_leaves_no_file(subject: Subject, tmp_path: Path) -> None:
    pair = subject.pair(tmp_path / "out", pools={"prefill": {"max_batched_tokens": 32}, "decode": {}})
    ticket = pair.submit(PROMPT, hidden_states=NAME)
    for _ in range(3):
        pair.turn()
    pair.abort(ticket)
    pair.run()
    for node in pair.nodes.values():
        assert node.writer is not None
        node.writer.close()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("pools", [{}, {"colocated": {}}])
def test_no_room_is_told(subject: Subject, tmp_path: Path, pools: dict[str, object]) -> None:
    config = {"folder": str(tmp_path), "layers": LAYERS, "max_queued": 100 * 2 * subject.model.config.hidden_size * 4}
    pair = subject.pair(tmp_path, pools=pools, hidden_states=config)
    tickets = [pair.submit(PROMPT, hidden_states=f"{i:032x}") for i in range(2)]
    too_long = pair.submit(PROMPT + PROMPT[:1], hidden_states=NAME)
    pair.pump()
    pair.run()
    outputs = [pair.outputs[ticket] for ticket in tickets]
    assert outputs[0].refused is None
    assert outputs[1].refused is not None
    assert outputs[1].refused.status == 429
    refused = pair.outputs[too_long].refused
    assert refused is not None
    assert refused.status == 400
    assert "max_queued" in refused.message
    pair.close()


def test_a_worker_without_a_folder_refuses(subject: Subject) -> None:
    pair = subject.pair(Path(), hidden_states={})
    ticket = pair.submit(PROMPT, hidden_states=NAME)
    pair.run()
    refused = pair.outputs[ticket].refused
    assert refused is not None
    assert refused.status == 400
    pair.close()


def test_a_name_is_never_a_path() -> None:
    for name in ("../../etc/passwd", "/tmp/x", NAME + "\n", NAME[:-1], NAME.upper()):
        message = Generate(1, "r", [1], 1, [Child(0, 0)], Sampling(), Stopping(1), hidden_states=name)
        with pytest.raises(msgspec.ValidationError):
            decode(encode(message))
