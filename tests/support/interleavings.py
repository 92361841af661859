"""Every interleaving of a few threads, by running them one step at a time.

The threads are real ones, and so is the code that they run; what they meet at is replaced: `ModelCondition` stands for
`threading.Condition` and lets the scheduler choose who goes on. A run is a list of choices. The explorer repeats runs
with the choices that were not made, depth first, until none is left; a run that reaches a state in which another was
goes no further, as all that may follow has been or will be tried from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any


class Deadlock(AssertionError):
    """No thread can go on."""


class _Killed(BaseException):
    """Ends the threads of a run that is over."""


class _Thread:
    def __init__(self, name: str) -> None:
        self.name = name
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.done = False
        self.at = "start"
        self.passed = 0
        """Points."""


class Scheduler:
    """One run. Its threads stop at each `point`, and go on when they are chosen.

    Args:
        choices: at the first points, the number of the thread that goes on.
        known: states in which a run was; added to.
    """

    def __init__(self, choices: list[int], known: set[Hashable]) -> None:
        self.choices = choices
        self.state: Callable[[], Hashable] = lambda: None
        """What the threads share, and what each knows besides the points that it has passed. The scenario's to set."""
        self._known = known
        self.taken: list[tuple[int, int]] = []
        """At each point the number of the thread that went on, and how many could have."""
        self.trace: list[str] = []
        self._threads: list[_Thread] = []
        self._here = threading.local()
        self._back = threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._killing = False

    def point(self, what: str, ready: Callable[[], bool] = lambda: True) -> None:
        """The running thread stops here, and goes on when it is chosen; not before ``ready()``."""
        if self._killing:
            raise _Killed
        me: _Thread = self._here.thread
        me.at, me.ready = what, ready
        me.passed += 1
        self._back.release()
        me.go.acquire()
        if self._killing:
            raise _Killed

    def run(self, threads: dict[str, Callable[[], None]]) -> None:
        """Run all to their ends, as the choices say and then always the first that can."""
        self._threads = [_Thread(name) for name in threads]
        started = [
            threading.Thread(target=self._start, args=(thread, function), daemon=True)
            for thread, function in zip(self._threads, threads.values(), strict=True)
        ]
        for one in started:
            one.start()
        try:
            while self._failure is None and (left := [thread for thread in self._threads if not thread.done]):
                able = [thread for thread in left if thread.ready()]
                if not able:
                    raise Deadlock(f"{ {thread.name: thread.at for thread in left} } after {self.trace}")
                if len(self.taken) < len(self.choices):
                    chosen = self.choices[len(self.taken)]
                else:
                    places = tuple((thread.done, thread.at, thread.passed) for thread in self._threads)
                    state = places, self.state()
                    if state in self._known:
                        break
                    self._known.add(state)
                    chosen = 0
                self.taken.append((chosen, len(able)))
                self.trace.append(f"{able[chosen].name}: {able[chosen].at}")
                able[chosen].go.release()
                self._back.acquire()
        finally:
            self._killing = True
            for thread in self._threads:
                thread.go.release()
            for one in started:
                one.join(10)
        if self._failure is not None:
            raise AssertionError(f"{self._failure} after {self.trace}") from self._failure

    def _start(self, thread: _Thread, function: Callable[[], None]) -> None:
        self._here.thread = thread
        thread.go.acquire()
        try:
            if not self._killing:
                function()
        except _Killed:
            return
        except BaseException as error:  # noqa: BLE001
            self._failure = error
        thread.done = True
        self._back.release()


class ModelCondition:
    """`threading.Condition`, as far as a waiter with a predicate needs it. A time-out may pass at any moment."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._held = False

    @property
    def held(self) -> bool:
        """Whether a thread has the lock."""
        return self._held

    def __enter__(self) -> None:
        self._scheduler.point("acquire", lambda: not self._held)
        self._held = True

    def __exit__(self, *_: Any) -> None:
        self._held = False

    def notify_all(self) -> None:
        assert self._held

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        assert self._held
        if predicate():
            return True
        self._held = False
        self._scheduler.point("wait", lambda: not self._held and (predicate() or timeout is not None))
        self._held = True
        return predicate()


class Explorer:
    """Runs a scenario under every schedule that leads to other states.

    Args:
        scenario: starts threads with the scheduler's `run`; must do the same whenever the choices are the same.
        max_runs: more is an error: the scenario is too large.

    Attributes:
        known: the states that were reached.
    """

    def __init__(self, scenario: Callable[[Scheduler], None], max_runs: int = 20_000) -> None:
        self.known: set[Hashable] = set()
        self._scenario = scenario
        self._max_runs = max_runs
        self.num_runs = 0

    def explore(self) -> None:
        """Blocks until no schedule is left, or one fails."""
        choices: list[int] = []
        while True:
            scheduler = Scheduler(choices, self.known)
            self._scenario(scheduler)
            self.num_runs += 1
            assert self.num_runs <= self._max_runs, f"more than {self._max_runs} schedules"
            taken = scheduler.taken
            while taken and taken[-1][0] == taken[-1][1] - 1:
                taken.pop()
            if not taken:
                return
            choices = [chosen for chosen, _ in taken]
            choices[-1] += 1
