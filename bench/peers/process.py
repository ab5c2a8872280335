# SPDX-License-Identifier: MIT
"""The parent's end of a worker: start it, ask it something, keep it stopped in between."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
REPLY_SECONDS = 900.0


class PeerError(RuntimeError):
    """A worker died, hung, or answered with an error."""


class Process:
    """One library with one number of threads; stopped except while it answers."""

    def __init__(self, peer: str, threads: int, python: str, folder: Path) -> None:
        self.peer, self.threads = peer, threads
        self.log = folder / f"{peer}-{threads}.log"
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                [python, "-m", "peers.worker", peer, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | settings(threads),
            )
        self.pending = b""
        self.reply_seconds = REPLY_SECONDS
        self.hello: dict[str, Any] = {}

    def greet(self) -> None:
        """Wait for its first word, what it offers; several that were started together import together."""
        self.hello = self._reply()
        if "missing" not in self.hello:
            self._signal(signal.SIGSTOP)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Let the worker run until it has answered one command."""
        self._signal(signal.SIGCONT)
        try:
            assert self.child.stdin is not None
            self.child.stdin.write(json.dumps({"do": do} | arguments).encode() + b"\n")
            self.child.stdin.flush()
            answer = self._reply()
        except BrokenPipeError:
            raise PeerError(f"died: {self._last_words()}") from None
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the worker, whatever state it is in."""
        self.child.kill()
        self.child.wait()

    def _reply(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        end = time.monotonic() + self.reply_seconds
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise PeerError(f"no answer in {self.reply_seconds:.0f} s")
            chunk = os.read(self.child.stdout.fileno(), 1 << 16)
            if not chunk:
                raise PeerError(f"died: {self._last_words()}")
            self.pending += chunk
        line, _, self.pending = self.pending.partition(b"\n")
        return dict(json.loads(line))

    def _signal(self, number: int) -> None:
        if self.child.poll() is None:
            self.child.send_signal(number)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.child.poll()}"


def settings(threads: int) -> dict[str, str]:
    """Every library's own way of being told its threads, read once at import; and where `peers` is."""
    names = (
        "CHAINRULE_NUM_THREADS",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PJRT_NPROC",
    )
    settings = dict.fromkeys(names, str(threads))
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH"))))
    # No pool of idle compiler processes, unless somebody asks for one.
    settings["TORCHINDUCTOR_COMPILE_THREADS"] = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if threads == 1:
        settings["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    return settings
