"""The YAML file: defaults, strictness, and what its mistakes are answered with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from tandem.core.checkpoint import model_folder, model_name
from tandem.core.config import Config, load_config
from tandem.core.environment import show_gpus
from tandem.core.errors import ConfigError
from tandem.core.units import format_bytes, parse_bytes
from tandem.kv_transfer.offload.policies import POLICIES
from tandem.kv_transfer.offload.stack import Write


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tandem.yaml"
    path.write_text(text)
    return path


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    return str(caught.value)


def test_defaults_serve_the_demo_model() -> None:
    config = load_config()
    assert config.model.path == "demo"
    assert config.pools.prefill is not None
    assert config.pools.decode is not None
    assert config.pools.colocated is None
    assert model_name(config) == "tandem-demo"
    assert (model_folder(config) / "config.json").is_file()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == load_config()


def test_the_demo_profile_is_the_defaults() -> None:
    assert load_config(Path(__file__).parents[2] / "deploy" / "profiles" / "demo.yaml") == load_config()


def test_an_unknown_key_names_its_neighbour_and_its_line(tmp_path: Path) -> None:
    text = complaint(tmp_path, "model: {path: demo}\nkv:\n  blok_tokens: 3\n")
    assert f"{tmp_path}/tandem.yaml:3: unknown key kv.blok_tokens; did you mean kv.block_tokens?" in text


def test_an_unknown_key_in_a_pool(tmp_path: Path) -> None:
    text = complaint(tmp_path, "pools:\n  decode: {max_runing: 4}\n")
    assert "unknown key pools.decode.max_runing; did you mean pools.decode.max_running?" in text


def test_a_key_without_a_neighbour_lists_what_is_known(tmp_path: Path) -> None:
    assert (
        "known here: model, pools, kv, routing, gateway, control, supervisor, observability, hidden_states, offload, experts, log"
        in complaint(tmp_path, "zzz: 1\n")
    )


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = complaint(tmp_path, "kv: {block_tokens: 0, capacity: 12 foo}\ngateway: {port: 99999}\n")
    assert "kv.block_tokens" in text
    assert "not a size: '12 foo'" in text
    assert "gateway.port" in text
    assert text.count("kv.capacity") == 1


def test_a_key_given_twice(tmp_path: Path) -> None:
    assert "kv.block_tokens is given twice" in complaint(tmp_path, "kv:\n  block_tokens: 8\n  block_tokens: 16\n")


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "a: [", "\t- x", "a: !!python/object:os.system x"])
def test_what_is_no_configuration(tmp_path: Path, text: str) -> None:
    assert "tandem.yaml" in complaint(tmp_path, text)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Path("/nowhere/tandem.yaml"))


def test_colocated_excludes_the_others() -> None:
    config = load_config(None, ["pools.colocated={}"])
    assert config.pools.prefill is None
    assert config.pools.decode is None
    with pytest.raises(ConfigError, match="give either colocated, or prefill and decode"):
        load_config(None, ["pools.colocated={}", "pools.decode={}"])


def test_every_pool_may_have_gpus_and_ranks() -> None:
    pools = load_config(None, ["pools.decode={gpus_per_replica: 1}", "pools.prefill={gpus_per_replica: 1}"]).pools
    assert pools.prefill is not None
    assert pools.decode is not None
    assert pools.prefill.gpus_per_replica == pools.decode.gpus_per_replica == 1
    for role in ("decode", "colocated"):
        pool = getattr(load_config(None, [f"pools.{role}={{gpus_per_replica: 2, tensor_parallel: 2}}"]).pools, role)
        assert pool.gpus_per_replica == pool.tensor_parallel == 2


def test_a_pool_has_kv_settings_of_its_own() -> None:
    pools = {"prefill": {"kv": {"block_tokens": 64}}, "decode": {"kv": {"dtype": "bfloat16", "capacity": "1GiB"}}}
    config = Config.model_validate({"pools": pools, "kv": {"capacity": "2GiB"}})
    prefill, decode = config.of_pool("prefill").kv, config.of_pool("decode").kv
    assert (prefill.block_tokens, prefill.dtype, prefill.capacity) == (64, "auto", 2 << 30)
    assert (decode.block_tokens, decode.dtype, decode.capacity) == (16, "bfloat16", 1 << 30)
    with pytest.raises(ValidationError, match=r"block_tokens is 64 of pools[.]prefill[.]kv and 16 of pools[.]decode"):
        Config.model_validate({"pools": pools, "offload": {"tiers": [{"kind": "host", "capacity": "1GiB"}]}})


def test_a_transport_for_gpus_wants_them() -> None:
    gpus = ["pools.prefill={gpus_per_replica: 1}", "kv.transport=cuda_ipc"]
    with pytest.raises(ConfigError, match=r"cuda_ipc is for GPUs, and pools\.decode\.gpus_per_replica is 0"):
        load_config(None, gpus)
    assert load_config(None, [*gpus, "pools.decode={gpus_per_replica: 1}"]).kv.transport == "cuda_ipc"
    assert load_config(None, ["pools.colocated={}", "kv.transport=cuda_ipc"]).pools.decode is None


def test_a_process_sees_the_gpus_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    show_gpus([])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    show_gpus(["2", "3"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_prefill_and_decode_may_differ_in_ranks() -> None:
    pools = load_config(None, ["pools.prefill={tensor_parallel: 2}", "pools.decode={tensor_parallel: 4}"]).pools
    assert pools.prefill is not None
    assert pools.decode is not None
    assert (pools.prefill.tensor_parallel, pools.decode.tensor_parallel) == (2, 4)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "kv: {block_tokens: 8}\n")
    config = load_config(path, ["kv.block_tokens=32", "gateway.api_keys=[a, b]", "pools.decode.max_running=3"])
    assert config.kv.block_tokens == 32
    assert config.gateway.api_keys == ("a", "b")
    assert config.pools.decode is not None
    assert config.pools.decode.max_running == 3


@pytest.mark.parametrize("override", ["kv", "=3", "kv.=3", "kv.block_tokens.x=1", "kv.block_tokens=[", "kv.nope=1"])
def test_bad_overrides(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, ["kv.block_tokens=16", override])


def test_offload_tiers(tmp_path: Path) -> None:
    text = """
offload:
  tiers:
    - {kind: host, capacity: 1GiB, policy: s3fifo}
    - {kind: remote}
    - {kind: disk, path: /a, capacity: 8GiB, policy: lru, write: write_back}
    - {kind: disk, path: [/b, /c], capacity: 8GiB}
    - {kind: s3, bucket: kv, capacity: 1TiB}
"""
    tiers = load_config(write(tmp_path, text)).offload.tiers
    assert [tier.kind for tier in tiers] == ["host", "remote", "disk", "disk", "s3"]
    assert [tier.path for tier in tiers] == [(), (), ("/a",), ("/b", "/c"), ()]
    assert load_config().offload.tiers == ()
    config = load_config(write(tmp_path, text))
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_policies_are_those_that_there_are() -> None:
    policy = Config.model_json_schema()["$defs"]["OffloadTierConfig"]["properties"]["policy"]
    assert policy["enum"] == list(POLICIES)
    write_policy = Config.model_json_schema()["$defs"]["OffloadTierConfig"]["properties"]["write"]
    assert write_policy["enum"] == [write.value for write in Write]


@pytest.mark.parametrize(
    ("tiers", "complaints"),
    [
        ("[{kind: tape, capacity: 1GiB}]", ["offload.tiers.0.kind", "'host', 'disk', 's3' or 'remote'"]),
        ("[{kind: host, capacity: 1GiB, policy: mru}]", ["offload.tiers.0.policy", "'tinylfu'"]),
        ("[{kind: host, capacity: 1GiB, write: never}]", ["offload.tiers.0.write"]),
        ("[{kind: host}]", ["offload.tiers.0.capacity"]),
        ("[{kind: host, capacity: 0}]", ["offload.tiers.0.capacity", "no use"]),
        ("[{kind: host, capacity: 1 parsec}]", ["offload.tiers.0.capacity", "not a size"]),
        ("[{kind: disk, capacity: 1GiB}]", ["offload.tiers.0: path: a disk tier needs a folder"]),
        ("[{kind: host, capacity: 1GiB, path: /a}]", ["offload.tiers.0: path: a host tier has none"]),
        ("[{kind: s3, capacity: 1GiB}]", ["offload.tiers.0: bucket: a s3 tier needs a bucket"]),
        ("[{kind: host, capacity: 1GiB}, {kind: host, capacity: 1GiB}]", ["offload: tiers: a node has one host tier"]),
        ("[{kind: s3, bucket: a, capacity: 1GiB}, {kind: s3, bucket: a, capacity: 2GiB}]", ["same bucket and prefix"]),
        ("[{kind: disk, path: [/a/b, /a], capacity: 1GiB}]", ["the folders /a/b and /a overlap"]),
        ("[{kind: remote}, {kind: host, capacity: 1GiB}]", ["offload: tiers: a remote tier", "put a host tier before"]),
        ("[{kind: host, capacity: 1GiB}, {kind: remote}, {kind: remote}]", ["one remote tier stands for all"]),
        ("[{kind: remote, capacity: 1GiB}]", ["offload.tiers.0.capacity: a remote tier has none"]),
        ("[{kind: remote, policy: lru}]", ["offload.tiers.0.policy: a remote tier has none"]),
        ("[{kind: remote, write: second_use}]", ["offload.tiers.0.write: a remote tier has none"]),
        ("[{kind: remote, path: /a}]", ["offload.tiers.0: path: a remote tier has none"]),
        ("[{kind: disk, pth: /a, capacity: 1GiB}]", ["unknown key offload.tiers.0.pth; did you mean", ".path?"]),
    ],
)
def test_bad_tiers_name_their_key(tmp_path: Path, tiers: str, complaints: list[str]) -> None:
    text = complaint(tmp_path, f"offload:\n  tiers: {tiers}\n")
    assert all(part in text for part in complaints), text


def test_a_missing_model_folder() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: /nowhere: the folder does not exist"):
        model_folder(load_config(None, ["model.path=/nowhere"]))


def test_the_schema_is_json_and_explains_every_key() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    for name, section in schema["$defs"].items():
        for key, value in section["properties"].items():
            assert value.get("description"), f"{name}.{key} has no description"


def test_a_configuration_survives_its_own_json() -> None:
    config = load_config(None, ["pools.colocated={replicas: 2}", "kv.capacity=64MiB"])
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("10", 10), ("2kb", 2000), (7, 7)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


def test_sizes_for_people() -> None:
    assert format_bytes(1610612736) == "1.5 GiB"
    assert format_bytes(12) == "12 B"
    assert format_bytes(5 * 2**40) == "5.0 TiB"


def test_the_guide_explains_every_key() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "yaml.md").read_text()
    for name, section in Config.model_json_schema()["$defs"].items():
        for key, value in section["properties"].items():
            described = " ".join(value["description"].split())
            assert described in guide or name == "PoolsConfig", f"docs/yaml.md lacks {name}.{key}: {described}"
