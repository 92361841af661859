"""Keys that were removed here, and that whoever keeps their blocks may not have heard of yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .keys import TierKey, tenant_of


class Forgetting:
    """One call of `Tier.remove` or `Tier.clear`, until all have heard of it.

    Args:
        keys: some keys; None: all keys of ``tenant``.
        tenant: a `tenant_tag`; None: of all tenants.
    """

    def __init__(self, keys: frozenset[TierKey] | None, tenant: bytes | None) -> None:
        self.keys = keys
        self.tenant = tenant

    def covers(self, key: TierKey) -> bool:
        """Whether a key is not to be found any more."""
        if self.keys is not None:
            return key in self.keys
        return self.tenant is None or tenant_of(key) == self.tenant


def forgotten(forgettings: Sequence[Forgetting], keys: Sequence[TierKey]) -> Iterable[int]:
    """The places of keys that are not to be found any more."""
    if not forgettings:
        return []
    return [place for place, key in enumerate(keys) if any(one.covers(key) for one in forgettings)]
