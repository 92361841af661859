"""A fork server for tests' processes: they begin with everything imported."""

from __future__ import annotations

import multiprocessing

forking = multiprocessing.get_context("forkserver")
# What takes long to import. Nothing of `support`: Python 3.11's fork server does not see the tests' folder.
forking.set_forkserver_preload(
    ["pytest", "tandem.cluster.worker_runtime", "tandem.cluster.gateway.runtime", "tandem.engine.ranks", "transformers"]
)
