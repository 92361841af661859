"""The one YAML: its schema, how it is read, and how its mistakes are told."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .bounds import MAX_PRIORITY
from .config_experts import ExpertsConfig
from .config_section import Section
from .errors import ConfigError
from .units import parse_bytes
from .yaml_file import apply_override, read_yaml

ByteSize = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, json_schema_extra={"examples": ["512MiB", "8GiB"]})]

KVDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8_e4m3"]

DEMO_MODEL = "demo"
"""The value of ``model.path`` that means the model that ships with Tandem."""


class ModelConfig(Section):
    path: str = DEMO_MODEL
    """A checkpoint folder in Hugging Face format; or a repository of the Hugging Face Hub, "organisation/name" or
    "organisation/name@revision", which each node fetches once; or "demo" for the model that ships with Tandem."""
    name: str | None = None
    """What clients call the model. Default: the folder's name, or "tandem-demo"."""
    load: Literal["auto", "dummy"] = "auto"
    """auto reads the weights; dummy makes random ones from config.json alone, for benchmarks."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's own on a GPU, float32 on a CPU."""
    max_model_len: int | None = Field(default=None, ge=16, le=1 << 22)
    """Longest prompt + output, in tokens. Default: what the model was made for."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of dummy weights."""
    kernels: dict[str, str] = Field(default={})
    """Operation → the backend that must serve it, for example {moe: torch}. `tandem explain` lists both."""


class PoolKVConfig(Section):
    block_tokens: int | None = Field(default=None, ge=1, le=1024)
    """In place of kv.block_tokens."""
    capacity: ByteSize | Literal["auto"] | None = None
    """In place of kv.capacity."""
    dtype: KVDtype | None = None
    """In place of kv.dtype."""


class _Pool(Section):
    replicas: int = Field(default=1, ge=1, le=1024)
    """Workers of this kind."""
    cpus_per_replica: float = Field(default=1, ge=0)
    """Logical CPUs that Ray reserves for each."""
    gpus_per_replica: int = Field(default=0, ge=0, le=8)
    """0 runs on the CPU; otherwise one GPU for each of tensor_parallel."""
    tensor_parallel: int = Field(default=1, ge=1, le=8)
    """Processes of one host that share the model, each with a part of every layer. Prefill and decode workers may have
    different numbers of them."""
    expert_parallel: int | None = Field(default=None, ge=1, le=1024)
    """Workers of this pool that share the experts of one model, each with as many processes as tensor_parallel says,
    over all of which experts are spread. Default: experts.parallel."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads that one CPU operation may use. Default: all of the node's."""
    kv: PoolKVConfig = PoolKVConfig()
    """What of the kv section is different in this pool. KV is converted on its way."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.gpus_per_replica not in (0, self.tensor_parallel):
            raise ValueError(
                f"gpus_per_replica: {self.gpus_per_replica} with tensor_parallel: {self.tensor_parallel}: "
                "give as many GPUs as ranks, or none"
            )
        return self


class PrefillPool(_Pool):
    max_batched_tokens: int = Field(default=2048, ge=16, le=1 << 20)
    """Tokens of one step; a longer prompt runs in chunks of this."""
    max_running: int = Field(default=256, ge=1, le=1 << 16)
    """Prompts that hold blocks at a time, those being computed and those waiting to be fetched."""


class DecodePool(_Pool):
    max_running: int = Field(default=64, ge=1, le=1 << 16)
    """Sequences that decode, or wait for their KV, at a time; more wait in the queue."""
    max_batched_tokens: int = Field(default=512, ge=16, le=1 << 20)
    """Tokens of one step when some are a prompt's: a short prompt, or a lost prefix, computed locally."""


class ColocatedPool(DecodePool):
    max_batched_tokens: int = Field(default=2048, ge=16, le=1 << 20)
    """Tokens of one step, prompts' and outputs' together."""


class PoolsConfig(Section):
    prefill: PrefillPool | None = None
    """Workers that compute prompts."""
    decode: DecodePool | None = None
    """Workers that stream tokens."""
    colocated: ColocatedPool | None = None
    """Workers that do both: the baseline. Excludes prefill and decode."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("colocated") is None:
            return {"prefill": {}, "decode": {}} | value
        return value

    @model_validator(mode="after")
    def _check(self) -> PoolsConfig:
        if self.colocated is not None and (self.prefill or self.decode):
            raise ValueError("colocated workers do prefill and decode: give either colocated, or prefill and decode")
        if self.colocated is None and not (self.prefill and self.decode):
            raise ValueError("both prefill and decode are needed, or colocated instead of them")
        return self


class FaultsConfig(Section):
    share: float = Field(gt=0, le=1)
    """Share of the reads that a decode worker starts: 0.01 is one in a hundred."""
    kind: Literal["error", "delay", "corrupt"] = "error"
    """error: the read fails. delay: it is carried out late, and cannot be called off meanwhile. corrupt: the numbers
    that show whether a block was reused come out wrong, as if it had been."""
    delay_s: float = Field(default=5, gt=0, le=3600)
    """How late a delayed read is carried out."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Which reads are hit depends on it."""


class KVConfig(Section):
    block_tokens: int = Field(default=16, ge=1, le=1024)
    """Tokens of one KV block."""
    capacity: ByteSize | Literal["auto"] = "auto"
    """Memory for KV blocks of one worker. auto: what max_running sequences of max_model_len can use, at most a
    quarter of the memory that is free when the worker starts; on a GPU, what the largest steps leave."""
    dtype: KVDtype = "auto"
    """auto: the model's. fp8_e4m3 halves the memory: 8 bits, 3 of them mantissa, unscaled, ±448 at most; on GPUs."""
    transport: Literal["auto", "cuda_ipc", "shm", "nixl", "ucx", "zmq"] = "auto"
    """How KV travels from prefill to decode. auto: on one host shared memory, between GPUs of one host CUDA's; between
    hosts NIXL where it is installed and RDMA is up, else ZMQ. Only ZMQ encrypts."""
    require_rdma: bool = False
    """Refuse to move KV between hosts by anything but RDMA: at the start an error, later that peer is not used."""
    copy_programs: int = Field(default=16, ge=1, le=128)
    """Processors of a decode worker's GPU that a copy of KV may take at a time."""
    layer_groups: int = Field(default=2, ge=1, le=256)
    """Groups of layers whose KV is handed over as soon as they are computed, while later layers still compute."""
    lease_s: float = Field(default=30, gt=0, le=3600)
    """How long prefill holds finished blocks for a reader that gives no sign of life."""
    handoff_timeout_s: float = Field(default=60, gt=0, le=3600)
    """How long decode waits for a prefill to move on before it computes the prompt itself."""
    on_load_failure: Literal["recompute", "fail"] = "recompute"
    """When KV does not arrive: compute the missing part again, or fail the request."""
    checksums: bool = False
    """Sum all KV before and after it travels, and treat a difference as KV that did not arrive."""
    prefix_cache: bool = True
    """Reuse the blocks of equal prefixes."""
    inject_faults: FaultsConfig | None = None
    """For rehearsals and tests alone: let a share of all reads of KV go wrong, as {share: 0.01, kind: error}."""
    poison_freed: bool = False
    """For debugging alone: fill blocks with NaN when they are reused, so that a use of what they held would show."""


class RoutingConfig(Section):
    policy: Literal["kv_aware", "prefix_hash", "least_loaded", "round_robin"] = "least_loaded"
    """How a gateway picks the workers of a request. kv_aware: where most of the prompt's KV is, weighed against what
    waits there. prefix_hash: prompts that begin alike go to the same, unless it has much to do."""
    local_prefill: Literal["auto", "never", "always"] = "auto"
    """Whether a decode worker computes a short rest of a prompt itself: auto when that is sooner."""


class _Tls(Section):
    tls_cert: str | None = None
    """A file with the certificate for `host` in PEM, those of its issuers behind it. Not given: no TLS."""
    tls_key: str | None = None
    """A file with its private key in PEM."""

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both, or neither")
        return self


class GatewayConfig(_Tls):
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Gateways that share the port, each a process of its own: when one dies, its connections are lost, and the others
    go on."""
    max_queued: int = Field(default=1024, ge=1, le=1 << 20)
    """Requests in flight in a gateway; one more is answered 429 with Retry-After, or one that is less urgent and has no
    token yet."""
    min_priority: int = Field(default=0, ge=-MAX_PRIORITY, le=0)
    """Lowest `priority` that a client may give a request, and so the most urgent; others are refused. 0: nobody gets
    ahead of those who give none."""
    max_body: ByteSize = 8 << 20
    """Largest request body."""
    api_keys: tuple[str, ...] = ()
    """Keys that clients must send as `Authorization: Bearer …`. Empty: everyone is served."""
    admin_keys: tuple[str, ...] = ()
    """Keys that operators must send likewise, to /admin. Empty: clients on the gateway's host alone are answered
    there."""
    failover_timeout_s: float = Field(default=60, gt=0, le=3600)
    """How long a request whose workers are gone waits for others before it fails."""


class ControlConfig(_Tls):
    host: str = "127.0.0.1"
    """Address on which the operators' API listens, gRPC, on the controller's node."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port to listen on; 0: any that is free. `control.json` beside the logs tells it, and the token."""


class SupervisorConfig(_Tls):
    port: int = Field(default=0, ge=0, le=65535)
    """Port on which each node with workers or a gateway tells its health and its metrics: HTTP and gRPC. 0: any that
    is free; `tandem status` tells which."""
    listen: Literal["auto", "node", "loopback"] = "auto"
    """Where: at the node's address in Ray, or to the node itself alone. auto: as the gateway, whose host may be a
    loopback address."""
    stalled_after_s: float = Field(default=60, gt=0, le=3600)
    """A worker that has had work for so long and taken no step is not ready."""


class TracesConfig(Section):
    endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")
    """Where spans are sent by OTLP over HTTP, for example http://127.0.0.1:4318/v1/traces; needs tandem[otel]. Not
    given: nothing is traced."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are traced, of those whose clients do not say themselves by a `traceparent`."""


class ObservabilityConfig(Section):
    traces: TracesConfig = TracesConfig()
    """Spans of requests, by OpenTelemetry."""


class HiddenStatesConfig(Section):
    folder: str | None = None
    """Where the hidden states of prompts are written for requests that ask for them with return_hidden_states, one
    safetensors file a prompt. Not given: such requests are refused."""
    layers: tuple[Annotated[int, Field(ge=0, lt=1 << 16)], ...] = ()
    """The layers whose outputs are written, counted from 0, before the model's last norm."""
    max_queued: ByteSize = 256 << 20
    """Bytes of prompts that a worker computes or still has to write; what finds no room is answered 429."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if (self.folder is None) != (not self.layers):
            raise ValueError("folder and layers go together: give both, or neither")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("a layer is given twice")
        return self


class OffloadTierConfig(Section):
    kind: Literal["host", "disk", "s3", "remote"]
    """host: a node's memory, shared by its workers. disk: folders. s3: a bucket of an S3-compatible store. remote: the
    host tiers of the other nodes, which can be read; it has no room of its own."""
    capacity: ByteSize = Field(default=0, validate_default=True)
    """Never exceeded: of a node's memory; of its folders together; of its objects. A remote tier has none."""
    policy: Literal["lru", "lfu", "arc", "s3fifo", "tinylfu"] = "s3fifo"
    """Which block goes when the tier is full."""
    write: Literal["write_through", "write_back", "second_use"] = "write_through"
    """Which blocks it takes: all; what the tier above gives up; what comes for the second time."""
    path: tuple[str, ...] = ()
    """Of a disk tier: a folder, or a list of folders on different disks, which share the blocks."""
    bucket: str | None = None
    """Of an s3 tier: where the objects are."""
    prefix: str = "tandem"
    """Of an s3 tier: what the objects' names begin with; of this cluster alone: another that uses it is refused."""
    endpoint: str | None = None
    """Of an s3 tier: its URL, for stores other than Amazon's. Keys come from where the AWS tools look for them."""
    timeout_s: float = Field(default=5, gt=0, le=600)
    """After this a read or a write counts as failed, and its blocks as missing."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("capacity", "policy", "write")
    @classmethod
    def _check_room(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("kind", "remote")
        if info.field_name == "capacity" and kind != "remote" and not value:
            raise ValueError(f"a {kind} tier needs one; without room it is of no use")
        if kind == "remote" and "kind" in info.data and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError("a remote tier has none: the other nodes' host tiers have theirs, and it keeps nothing")
        return value

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        for kind, key, wanted in (("disk", "path", "a folder of its own"), ("s3", "bucket", "a bucket")):
            if (self.kind == kind) != bool(getattr(self, key)):
                needs = f"a {kind} tier needs {wanted}" if self.kind == kind else f"a {self.kind} tier has none"
                raise ValueError(f"{key}: {needs}")
        return self


class OffloadConfig(Section):
    tiers: tuple[OffloadTierConfig, ...] = ()
    """Where KV blocks go beyond the workers' own memory, nearest first. Empty: nowhere."""
    moving: ByteSize = 64 << 20
    """Memory of a worker for blocks on their way from its own to a tier, or on to the next. What finds none is lost."""

    @model_validator(mode="after")
    def _check_tiers(self) -> Self:
        if sum(tier.kind == "host" for tier in self.tiers) > 1:
            raise ValueError("tiers: a node has one host tier")
        kinds = [tier.kind for tier in self.tiers]
        if kinds.count("remote") > 1:
            raise ValueError("tiers: one remote tier stands for all other nodes")
        if "remote" in kinds and "host" not in kinds[: kinds.index("remote")]:
            raise ValueError("tiers: a remote tier reads other nodes' host tiers: put a host tier before it")
        stores = [(tier.endpoint, tier.bucket, tier.prefix) for tier in self.tiers if tier.kind == "s3"]
        if len(set(stores)) != len(stores):
            raise ValueError("tiers: two s3 tiers have the same bucket and prefix")
        folders = [Path(path).expanduser().resolve() for tier in self.tiers for path in tier.path]
        for number, folder in enumerate(folders):
            for other in folders[:number]:
                if folder.is_relative_to(other) or other.is_relative_to(folder):
                    raise ValueError(f"tiers: the folders {other} and {folder} overlap")
        return self


class LogConfig(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severity that is written."""
    format: Literal["text", "json"] = "text"
    """One line of text, or one JSON object, a record."""
    max_per_s: int = Field(default=100, ge=0, le=1 << 20)
    """Records a second that one cause, a line of the code, may write; of others only the number is told. 0: any."""


class Config(Section):
    """Tandem's configuration: everything has a default, and the empty file serves the demo model."""

    model: ModelConfig = ModelConfig()
    pools: PoolsConfig = Field(default_factory=lambda: PoolsConfig.model_validate({}))
    kv: KVConfig = KVConfig()
    routing: RoutingConfig = RoutingConfig()
    gateway: GatewayConfig = GatewayConfig()
    control: ControlConfig = ControlConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    hidden_states: HiddenStatesConfig = HiddenStatesConfig()
    offload: OffloadConfig = OffloadConfig()
    experts: ExpertsConfig = ExpertsConfig()
    log: LogConfig = LogConfig()

    def of_pool(self, role: str) -> Config:
        """What it means for the workers of one pool: their own KV settings are those of the kv section.

        Args:
            role: prefill, decode or colocated; its pool is there.
        """
        own = getattr(self.pools, role).kv.model_dump(exclude_none=True)
        return self.model_copy(update={"kv": self.kv.model_copy(update=own)}) if own else self

    @model_validator(mode="after")
    def _check_host_tier(self) -> Self:
        if not any(tier.kind == "host" for tier in self.offload.tiers):
            return self
        roles = [role for role in PoolsConfig.model_fields if getattr(self.pools, role) is not None]
        for key in ("block_tokens", "dtype"):
            values = {role: getattr(self.of_pool(role).kv, key) for role in roles}
            if len(set(values.values())) > 1:
                found = " and ".join(f"{value} of pools.{role}.kv" for role, value in values.items())
                raise ValueError(f"offload.tiers: a host tier keeps blocks of one size, and {key} is {found}")
        return self

    @model_validator(mode="after")
    def _check_devices(self) -> Self:
        movers = {"prefill": self.pools.prefill, "decode": self.pools.decode}
        lacking = [name for name, pool in movers.items() if pool is not None and not pool.gpus_per_replica]
        if self.kv.transport == "cuda_ipc" and lacking:
            raise ValueError(f"kv.transport: cuda_ipc is for GPUs, and pools.{lacking[0]}.gpus_per_replica is 0")
        return self

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        for role in ("prefill", "decode", "colocated"):
            pool, size = getattr(self.pools, role), self.expert_parallel(role)
            if pool is None or size == 1:
                continue
            if pool.replicas % size:
                raise ValueError(
                    f"experts.parallel: pools.{role}.replicas: {pool.replicas} is no multiple of {size} workers that "
                    f"share experts: give {size} replicas, or pools.{role}.expert_parallel: 1"
                )
        return self

    def expert_parallel(self, role: str) -> int:
        """How many workers of a role share the experts of one model; 1 for a gateway."""
        pool: _Pool | None = getattr(self.pools, role, None)
        if pool is None:
            return 1
        return self.experts.parallel if pool.expert_parallel is None else pool.expert_parallel


class ConfigSource:
    """A configuration that is read and not yet checked, for those who check what they have made of it.

    Args:
        path: the YAML file, or None for the defaults.
        overrides: "kv.block_tokens=32" each; the value is YAML.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a key twice.
    """

    def __init__(self, path: Path | None = None, overrides: Sequence[str] = ()) -> None:
        self.tree: dict[str, Any] = {}
        """What the file says, with the overrides."""
        self._path = path
        self._lines: dict[tuple[str, ...], int] = {}
        if path is not None:
            self.tree, self._lines = read_yaml(path)
        for override in overrides:
            apply_override(self.tree, override)

    def check(self, tree: dict[str, Any]) -> Config:
        """The configuration that a tree means; lines are told by the keys in the file.

        Raises:
            ConfigError: with file, line, the offending key, and its nearest neighbour if the key is unknown.
        """
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(error, self._path, self._lines))) from None


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration. Reads one file; blocks for that long.

    Args:
        path: the YAML file, or None for the defaults.
        overrides: "kv.block_tokens=32" each; the value is YAML.

    Raises:
        ConfigError: with file, line, the offending key, and its nearest neighbour if the key is unknown.
    """
    source = ConfigSource(path, overrides)
    return source.check(source.tree)


def _explain(error: ValidationError, path: Path | None, lines: dict[tuple[str, ...], int]) -> Iterator[str]:
    told = set()
    for problem in error.errors():
        location = tuple(str(part) for part in problem["loc"])
        # Pydantic names the branch of a union in the location; the user wrote no such key.
        location = tuple(part for part in location if part not in ("auto", "function-before[parse_bytes(), int]"))
        location = tuple(part for part in location if not part.startswith(("literal[", "function-", "constrained-")))
        line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        name = ".".join(location) or "configuration"
        if name in told:  # each branch of a union complains; the first says enough
            continue
        told.add(name)
        if problem["type"] == "extra_forbidden":
            yield f"{where}unknown key {name}{_suggest(location)}"
        else:
            text = problem["msg"].removeprefix("Value error, ")
            found = problem.get("input")
            shown = "" if isinstance(found, dict) else f", found {found!r}"
            yield f"{where}{name}: {text[0].lower()}{text[1:]}{shown}"


def _suggest(location: tuple[str, ...]) -> str:
    section: Any = Config
    for part in location[:-1]:
        if part.isdigit():  # one of several sections
            continue
        annotation = section.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        section = next(a for a in options if isinstance(a, type) and issubclass(a, Section))
    known = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {'.'.join((*location[:-1], near[0]))}?"
    return f"; known here: {', '.join(known)}"
