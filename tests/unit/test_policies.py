"""Every policy against a slow, obviously right model of the same algorithm: plain lists, searched from end to end."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.patience import slowness
from tandem.core.errors import ConfigError
from tandem.kv_transfer.offload.policies import POLICIES, Policy, make_policy
from tandem.kv_transfer.offload.policies.sketch import MAX_COUNT, FrequencySketch


def key_of(number: int) -> bytes:
    """Its four hashes are the number itself: small numbers do not collide in a sketch."""
    return number.to_bytes(4, "little") * 4


class Model:
    """What all models share: pinned keys stand aside, with the place they came from. The first of a list goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.aside: dict[bytes, object] = {}

    def place(self, key: bytes) -> object:
        raise NotImplementedError

    def take(self, key: bytes) -> None:
        raise NotImplementedError

    def put(self, key: bytes, place: object) -> None:
        raise NotImplementedError

    def insert(self, key: bytes) -> None:
        raise NotImplementedError

    def use(self, key: bytes) -> None:
        raise NotImplementedError

    def evict(self, incoming: bytes) -> bytes | None:
        raise NotImplementedError

    def insert_pinned(self, key: bytes) -> None:
        self.insert(key)
        self.pin(key)

    def pin(self, key: bytes) -> None:
        self.aside[key] = self.place(key)
        self.take(key)

    def unpin(self, key: bytes) -> None:
        self.put(key, self.aside.pop(key))

    def touch(self, key: bytes) -> None:
        pinned = key in self.aside
        if pinned:
            self.unpin(key)
        self.use(key)
        if pinned:
            self.pin(key)

    def remove(self, key: bytes) -> None:
        if key in self.aside:
            del self.aside[key]
        else:
            self.take(key)


class Listed(Model):
    """Keys in several lists, by name."""

    names: tuple[str, ...] = ()

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.lists: dict[str, list[bytes]] = {name: [] for name in self.names}

    def place(self, key: bytes) -> object:
        return next(name for name, keys in self.lists.items() if key in keys)

    def take(self, key: bytes) -> None:
        self.lists[str(self.place(key))].remove(key)

    def put(self, key: bytes, place: object) -> None:
        self.lists[str(place)].append(key)


class LRUModel(Listed):
    names = ("all",)

    def insert(self, key: bytes) -> None:
        self.put(key, "all")

    def use(self, key: bytes) -> None:
        self.take(key)
        self.put(key, "all")

    def evict(self, incoming: bytes) -> bytes | None:
        return self.lists["all"].pop(0) if self.lists["all"] else None


class LFUModel(Model):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.keys: list[tuple[bytes, int]] = []

    def place(self, key: bytes) -> object:
        return dict(self.keys)[key]

    def take(self, key: bytes) -> None:
        self.keys = [entry for entry in self.keys if entry[0] != key]

    def put(self, key: bytes, place: object) -> None:
        self.keys.append((key, place))  # type: ignore[arg-type]

    def insert(self, key: bytes) -> None:
        self.put(key, 1)

    def use(self, key: bytes) -> None:
        count = self.place(key)
        self.take(key)
        self.put(key, min(count + 1, 255))  # type: ignore[operator]

    def evict(self, incoming: bytes) -> bytes | None:
        if not self.keys:
            return None
        fewest = min(count for _, count in self.keys)
        victim = next(key for key, count in self.keys if count == fewest)
        self.take(victim)
        return victim


class ARCModel(Listed):
    """The paper's figure 4, where REPLACE always remembers what it drops, and lists are cut after that."""

    names = ("t1", "t2")

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.b1: list[bytes] = []
        self.b2: list[bytes] = []
        self.p = 0.0
        self.moved = False

    def move_p(self, key: bytes) -> None:
        if self.moved:
            return
        if key in self.b1:
            self.p = min(self.capacity, self.p + max(1, len(self.b2) / len(self.b1)))
        if key in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))

    def evict(self, incoming: bytes) -> bytes | None:
        self.move_p(incoming)
        self.moved = True
        t1, t2 = self.lists["t1"], self.lists["t2"]
        if not t1 and not t2:
            return None
        first = bool(t1) and (len(t1) > self.p or (incoming in self.b2 and len(t1) == self.p))
        if first or not t2:
            self.b1.append(t1[0])
            return t1.pop(0)
        self.b2.append(t2[0])
        return t2.pop(0)

    def insert(self, key: bytes) -> None:
        self.move_p(key)
        self.moved = False
        known = key in self.b1 + self.b2
        self.b1 = [other for other in self.b1 if other != key]
        self.b2 = [other for other in self.b2 if other != key]
        self.put(key, "t2" if known else "t1")
        t1, t2 = self.lists["t1"], self.lists["t2"]
        excess = min(max(0, len(t1) + len(self.b1) - self.capacity), len(self.b1))
        self.b1 = self.b1[excess:]
        excess = min(max(0, len(t1) + len(t2) + len(self.b1) + len(self.b2) - 2 * self.capacity), len(self.b2))
        self.b2 = self.b2[excess:]

    def use(self, key: bytes) -> None:
        self.take(key)
        self.put(key, "t2")


class S3FIFOModel(Listed):
    names = ("small", "main")

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.uses: Counter[bytes] = Counter()
        self.ghost: list[bytes] = []

    def insert(self, key: bytes) -> None:
        self.uses[key] = 0
        self.put(key, "main" if key in self.ghost else "small")
        self.ghost = [other for other in self.ghost if other != key]

    def use(self, key: bytes) -> None:
        self.uses[key] = min(3, self.uses[key] + 1)

    def evict(self, incoming: bytes) -> bytes | None:
        small, main = self.lists["small"], self.lists["main"]
        if small and (len(small) >= 0.1 * self.capacity or not main):
            while small:
                key = small.pop(0)
                if self.uses[key] > 1:
                    self.uses[key] = 0
                    main.append(key)
                    continue
                self.ghost.append(key)
                self.ghost = self.ghost[-max(1, self.capacity - int(0.1 * self.capacity)) :]
                return key
        while main:
            key = main.pop(0)
            if self.uses[key] == 0:
                return key
            self.uses[key] -= 1
            main.append(key)
        return None


class TinyLFUModel(Listed):
    """Occurrences are counted exactly: the tests' keys do not collide."""

    names = ("window", "probation", "protected")

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.window_size = max(1, capacity // 100)
        self.protected_size = int(0.8 * (capacity - self.window_size))
        self.count: Counter[bytes] = Counter()
        self.added = 0

    def occurs(self, key: bytes) -> None:
        self.count[key] = min(15, self.count[key] + 1)
        self.added += 1
        if self.added >= 10 * self.capacity:
            self.count = Counter({key: count // 2 for key, count in self.count.items()})
            self.added //= 2

    def put(self, key: bytes, place: object) -> None:
        super().put(key, place)
        for name, size in (("window", self.window_size), ("protected", self.protected_size)):
            while len(self.lists[name]) > size:
                self.lists["probation"].append(self.lists[name].pop(0))

    def insert(self, key: bytes) -> None:
        self.occurs(key)
        self.put(key, "window")

    def use(self, key: bytes) -> None:
        self.occurs(key)
        place = self.place(key)
        self.take(key)
        self.put(key, "window" if place == "window" else "protected")

    def evict(self, incoming: bytes) -> bytes | None:
        window, main = self.lists["window"], self.lists["probation"] or self.lists["protected"]
        if len(window) < self.window_size and main:
            return main.pop(0)
        if not window:
            return None
        if main and self.count[window[0]] > self.count[main[0]]:
            victim = main.pop(0)
            self.lists["probation"].append(window.pop(0))
            return victim
        return window.pop(0)


MODELS: dict[str, type[Model]] = {
    "lru": LRUModel, "lfu": LFUModel, "arc": ARCModel, "s3fifo": S3FIFOModel, "tinylfu": TinyLFUModel,
}  # fmt: skip

operations = st.lists(
    st.tuples(st.sampled_from(["use", "use", "use", "reserve", "pin", "unpin", "remove"]), st.integers(0, 14)),
    max_size=150,
)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=300)
@given(capacity=st.integers(1, 12), steps=operations)
def test_a_policy_is_its_model(name: str, capacity: int, steps: list[tuple[str, int]]) -> None:
    policy: Policy = POLICIES[name](capacity)
    model = MODELS[name](capacity)
    present: set[bytes] = set()
    pinned: set[bytes] = set()
    for what, number in steps:
        key = key_of(number)
        if what in ("use", "reserve") and key in present:
            policy.touch(key)
            model.touch(key)
        elif what in ("use", "reserve"):
            if len(present) == capacity:
                victim = policy.evict(key)
                assert victim == model.evict(key)
                assert (victim is None) == (pinned == present), "None means that all are pinned, and nothing else"
                if victim is None:
                    continue
                assert victim in present - pinned
                present.discard(victim)
            for either in (policy, model):
                (either.insert_pinned if what == "reserve" else either.insert)(key)
            present.add(key)
            if what == "reserve":
                pinned.add(key)
        elif what == "pin" and key in present - pinned:
            policy.pin(key)
            model.pin(key)
            pinned.add(key)
        elif what == "unpin" and key in pinned:
            policy.unpin(key)
            model.unpin(key)
            pinned.discard(key)
        elif what == "remove" and key in present:
            policy.remove(key)
            model.remove(key)
            present.discard(key)
            pinned.discard(key)
        assert len(policy) == len(present)
        assert all((key_of(n) in policy) == (key_of(n) in present) for n in range(15))


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=100)
@given(steps=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 2), st.booleans()), max_size=80))
def test_priorities_are_strict(name: str, steps: list[tuple[int, int, bool]]) -> None:
    policy = make_policy(name, 5)
    priorities: dict[bytes, int] = {}
    pinned: set[bytes] = set()
    for number, priority, pin in steps:
        key = key_of(number)
        if key in priorities:
            policy.touch(key)
            continue
        if len(priorities) == 5:
            lowest = min((priorities[other] for other in priorities if other not in pinned), default=None)
            victim = policy.evict(key, priority)
            if lowest is None or lowest > priority:
                assert victim is None
                continue
            assert victim is not None
            assert victim not in pinned
            assert priorities.pop(victim) == lowest
        priorities[key] = priority
        if pin and len(pinned) < 4:
            policy.insert_pinned(key, priority)
            pinned.add(key)
        else:
            policy.insert(key, priority)
    assert len(policy) == len(priorities)


@pytest.mark.parametrize("name", POLICIES)
def test_a_million_operations_take_seconds(name: str) -> None:
    capacity, count = 20_000, 1_000_000
    rng = np.random.default_rng(0)
    keys = [rng.bytes(32) for _ in range(60_000)]
    order = (rng.zipf(1.1, count) % len(keys)).tolist()
    policy = make_policy(name, capacity)
    hits = 0
    start_s = time.process_time()
    for number in order:
        key = keys[number]
        if key in policy:
            policy.touch(key)
            hits += 1
        else:
            if len(policy) == capacity:
                policy.evict(key)
            policy.insert(key)
    assert time.process_time() - start_s < 15 * slowness()
    assert hits > count / 2
    assert len(policy) == capacity


@pytest.mark.parametrize("name", ["arc", "s3fifo", "tinylfu"])
def test_a_scan_does_not_flush_what_is_used(name: str) -> None:
    """What these are for: a hundred keys in steady use survive ten thousand that come once. LRU loses them all."""

    def survivors(name: str) -> int:
        policy = make_policy(name, 200)
        used, rng = [rng_key(n) for n in range(100)], np.random.default_rng(0)
        for step in range(20_000):
            fresh = rng_key(1000 + step)
            for key in [used[int(rng.integers(100))]] * (step < 2000) + [fresh]:
                if key in policy:
                    policy.touch(key)
                    continue
                if len(policy) == 200:
                    policy.evict(key)
                policy.insert(key)
        return sum(key in policy for key in used)

    assert survivors("lru") == 0
    assert survivors(name) > 60


def rng_key(number: int) -> bytes:
    return np.random.default_rng(number).bytes(16)


@given(st.lists(st.integers(0, 40), max_size=200))
def test_the_sketch_never_counts_too_little(numbers: list[int]) -> None:
    sketch = FrequencySketch(100)
    for number in numbers:
        sketch.add(rng_key(number))
    for number, count in Counter(numbers).items():
        assert sketch.estimate(rng_key(number)) >= min(count, MAX_COUNT)


def test_the_sketch_forgets() -> None:
    sketch = FrequencySketch(4)
    for _ in range(12):
        sketch.add(key_of(1))
    for number in range(28):
        sketch.add(key_of(2 + number % 3))
    assert sketch.estimate(key_of(1)) == 6


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy: mru is not known"):
        make_policy("mru", 4)
