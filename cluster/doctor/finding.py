"""One row of the doctor's table."""

from __future__ import annotations

import enum

import msgspec


class Verdict(enum.StrEnum):
    """`fail`: Tandem cannot serve like this, or not as the YAML demands. `warn`: slower or frailer than need be."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    """What was looked at, what was seen, and what to do about it."""

    section: str
    where: str
    """A node's address, a pair of workers, or "here": where the command runs."""
    check: str
    verdict: Verdict
    measured: str
    expected: str = ""
    fix: str = ""


class Notes:
    """Findings of one section and place, in the order in which they are made."""

    def __init__(self, section: str, where: str) -> None:
        self.findings: list[Finding] = []
        self._section = section
        self._where = where

    def ok(self, check: str, measured: str, expected: str = "") -> None:
        """All is well."""
        self._add(check, Verdict.OK, measured, expected, "")

    def warn(self, check: str, measured: str, expected: str, fix: str) -> None:
        """It works, but should be better."""
        self._add(check, Verdict.WARN, measured, expected, fix)

    def fail(self, check: str, measured: str, expected: str, fix: str) -> None:
        """It does not work."""
        self._add(check, Verdict.FAIL, measured, expected, fix)

    def judge(self, check: str, good: bool, measured: str, expected: str, fix: str, *, fatal: bool = False) -> None:
        """`ok` if ``good``; else `fail` if ``fatal``, or `warn`."""
        verdict = Verdict.OK if good else Verdict.FAIL if fatal else Verdict.WARN
        self._add(check, verdict, measured, expected, "" if good else fix)

    def _add(self, check: str, verdict: Verdict, measured: str, expected: str, fix: str) -> None:
        self.findings.append(Finding(self._section, self._where, check, verdict, measured, expected, fix))
