"""Cleans up after a `tandem serve`, or the owner of a host tier, that was killed and could not.

Runs beside it, waits on a pipe from it, and does nothing while it lives. When the pipe closes and its folder is still
there, it ends the processes that still use the folder, and removes it.

Usage: python -m tandem.cluster.janitor FOLDER [orphan], with a pipe as standard input.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_GRACE_S = 3.0


def hire(folder: Path, *, orphan: bool = False) -> subprocess.Popen[bytes]:
    """Start a janitor for a folder; it ends when the returned process's standard input is closed, by us or by our
    death.

    Args:
        folder: what is to be removed.
        orphan: it shall outlive a worker process of Ray's, which kills its children when it ends, and whose logs are
            in a folder with a janitor of its own. The returned process has ended then, as a rule.
    """
    arguments = [str(folder), *(["orphan"] if orphan else [])]
    output = subprocess.DEVNULL if orphan else None
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name, *arguments],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def main() -> None:
    """Wait for the end of standard input, then clean up what is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["orphan"] and os.fork():
        os._exit(0)
    sys.stdin.buffer.read()
    if not folder.is_dir():
        return
    time.sleep(_GRACE_S)  # most processes notice by themselves
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != psutil.Process().pid and _uses(process, folder):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _uses(process: psutil.Process, folder: Path) -> bool:
    return any(file.path.startswith(f"{folder}/") for file in process.open_files())


if __name__ == "__main__":
    main()
