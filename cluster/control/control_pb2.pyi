from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("name", "peer", "role", "phase", "node", "restarts", "load")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    peer: str
    role: str
    phase: str
    node: str
    restarts: int
    load: Load
    def __init__(self, name: _Optional[str] = ..., peer: _Optional[str] = ..., role: _Optional[str] = ..., phase: _Optional[str] = ..., node: _Optional[str] = ..., restarts: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "queued_tokens", "free_blocks", "num_blocks", "leases", "transfers", "output_tokens", "prompt_tokens", "received_bytes", "peers", "refused", "experts")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    queued_tokens: int
    free_blocks: int
    num_blocks: int
    leases: int
    transfers: int
    output_tokens: int
    prompt_tokens: int
    received_bytes: int
    peers: _containers.RepeatedScalarFieldContainer[str]
    refused: _containers.ScalarMap[str, str]
    experts: Experts
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., leases: _Optional[int] = ..., transfers: _Optional[int] = ..., output_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., received_bytes: _Optional[int] = ..., peers: _Optional[_Iterable[str]] = ..., refused: _Optional[_Mapping[str, str]] = ..., experts: _Optional[_Union[Experts, _Mapping]] = ...) -> None: ...

class Experts(_message.Message):
    __slots__ = ("num_ranks", "num_layers", "num_experts", "num_slots", "max_replicas", "state", "placed_at_s", "balancedness", "predicted", "window_steps", "outcome", "detail", "ended_at_s", "took_s", "moved", "moved_bytes", "attempts", "total_moved", "total_bytes")
    class AttemptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PLACED_AT_S_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    WINDOW_STEPS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_S_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MOVED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_ranks: int
    num_layers: int
    num_experts: int
    num_slots: int
    max_replicas: int
    state: str
    placed_at_s: float
    balancedness: float
    predicted: float
    window_steps: int
    outcome: str
    detail: str
    ended_at_s: float
    took_s: float
    moved: int
    moved_bytes: int
    attempts: _containers.ScalarMap[str, int]
    total_moved: int
    total_bytes: int
    def __init__(self, num_ranks: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., num_slots: _Optional[int] = ..., max_replicas: _Optional[int] = ..., state: _Optional[str] = ..., placed_at_s: _Optional[float] = ..., balancedness: _Optional[float] = ..., predicted: _Optional[float] = ..., window_steps: _Optional[int] = ..., outcome: _Optional[str] = ..., detail: _Optional[str] = ..., ended_at_s: _Optional[float] = ..., took_s: _Optional[float] = ..., moved: _Optional[int] = ..., moved_bytes: _Optional[int] = ..., attempts: _Optional[_Mapping[str, int]] = ..., total_moved: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker", "grace_s", "restart", "finish", "key")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    worker: str
    grace_s: float
    restart: bool
    finish: bool
    key: str
    def __init__(self, worker: _Optional[str] = ..., grace_s: _Optional[float] = ..., restart: _Optional[bool] = ..., finish: _Optional[bool] = ..., key: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RestartRequest(_message.Message):
    __slots__ = ("pool", "grace_s", "key")
    POOL_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    pool: str
    grace_s: float
    key: str
    def __init__(self, pool: _Optional[str] = ..., grace_s: _Optional[float] = ..., key: _Optional[str] = ...) -> None: ...

class RestartResponse(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    def __init__(self, worker: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("pool", "replicas", "key")
    POOL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    pool: str
    replicas: int
    key: str
    def __init__(self, pool: _Optional[str] = ..., replicas: _Optional[int] = ..., key: _Optional[str] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("started", "drained")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    started: _containers.RepeatedScalarFieldContainer[str]
    drained: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, started: _Optional[_Iterable[str]] = ..., drained: _Optional[_Iterable[str]] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("pool", "timeout_s")
    POOL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    pool: str
    timeout_s: float
    def __init__(self, pool: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Rebalanced]
    def __init__(self, groups: _Optional[_Iterable[_Union[Rebalanced, _Mapping]]] = ...) -> None: ...

class Rebalanced(_message.Message):
    __slots__ = ("worker", "outcome")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    worker: str
    outcome: str
    def __init__(self, worker: _Optional[str] = ..., outcome: _Optional[str] = ...) -> None: ...

class ExpertLoadRequest(_message.Message):
    __slots__ = ("worker", "after")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    after: int
    def __init__(self, worker: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class ExpertLoadResponse(_message.Message):
    __slots__ = ("entries", "num_layers", "num_experts", "model", "last")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[ExpertLoadEntry]
    num_layers: int
    num_experts: int
    model: str
    last: int
    def __init__(self, entries: _Optional[_Iterable[_Union[ExpertLoadEntry, _Mapping]]] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., model: _Optional[str] = ..., last: _Optional[int] = ...) -> None: ...

class ExpertLoadEntry(_message.Message):
    __slots__ = ("number", "steps", "tokens")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    number: int
    steps: int
    tokens: bytes
    def __init__(self, number: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[bytes] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("number", "at_s", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: int
    at_s: float
    text: str
    def __init__(self, number: _Optional[int] = ..., at_s: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...
