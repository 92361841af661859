"""What tests of disturbances take for right, see `support.undisturbed`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import undisturbed
from support.load import Body, Tokens, body
from support.undisturbed import Undisturbed

pytestmark = pytest.mark.chaos


def test_only_ties_are_as_good(
    golden: Callable[[list[Body]], list[Undisturbed]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = body(3, max_tokens=8, seed=17)
    [want] = golden([request])
    other = want[0][3] ^ 1
    [rest] = golden([request | {"prompt": [*request["prompt"], *want[0][:3], other], "max_tokens": 4}])

    def allowed(tokens: list[int]) -> bool:
        return want.allows(0, tokens)

    said: Tokens = {0: [*want[0][:3], other, *rest[0]]}
    assert undisturbed._draw([*request["prompt"], *want[0][:3]], 17, 1.0, want[0][3]) == want[0][3]
    assert allowed(want[0])
    assert want.allows(0, want[0][:5], whole=False)
    assert not allowed(want[0][:5])
    assert not allowed(said[0])
    monkeypatch.setattr(undisturbed, "_LAST_BITS", 1e4)  # everything is a tie
    assert allowed(said[0])
    assert want.allows(0, said[0][:6], whole=False)
    assert not Undisturbed(want, request | {"stop": ["x"]}, lambda _: want).allows(0, said[0])
    monkeypatch.setattr(undisturbed, "_LAST_BITS", 1e-4)
    assert not allowed([*said[0][:4], *want[0][4:]])
