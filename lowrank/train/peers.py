"""End every process of a run soon after one of them has died.

A process that waits in a collective operation for a dead one waits for minutes (NCCL), or ends with a
traceback (gloo). Here every process keeps a connection to the first one. The kernel closes the connections of
a process that dies, for whatever reason, so the others notice at once and end with one sentence.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

GRACE = 10.0  # seconds that the main thread has to end by itself
_DONE = b"d"  # a process has finished its run
_LOST = b"l"  # a process has died


class _Watch:
    """The connections of this process, each read by a thread."""

    def __init__(self, links: dict[int, socket.socket]) -> None:
        self._links = links
        self._ending = False
        self.lost = threading.Event()
        for rank, link in links.items():
            threading.Thread(target=self._follow, args=(rank, link), daemon=True).start()

    def _follow(self, rank: int, link: socket.socket) -> None:
        try:
            word = link.recv(1)
        except OSError:
            word = b""
        if word == _DONE or self._ending or self.lost.is_set():
            return
        self.lost.set()
        who = "another process" if word == _LOST else f"process {rank}"
        print(
            f"error: {who} of this run has ended, with its own message if it could write one; continue from "
            "the last checkpoint with --resume",
            file=sys.stderr,
            flush=True,
        )
        self._send(_LOST)
        end = threading.Timer(GRACE, os._exit, (1,))  # the main thread may wait for the dead for ever
        end.daemon = True
        end.start()

    def _send(self, word: bytes) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):  # it may be the connection of the dead process
                link.sendall(word)

    def close(self, done: bool) -> None:
        """Disconnect; the others go on if this process is `done`, else they end."""
        self._ending = True
        if done:
            self._send(_DONE)
        for link in self._links.values():
            link.close()


@contextlib.contextmanager
def watched(accelerator: Accelerator) -> Iterator[None]:
    """End this process with exit code 1 and one sentence if another process dies during the block."""
    if accelerator.num_processes == 1:
        yield
        return
    watch = _Watch(_connect(accelerator))
    try:
        yield
    except RuntimeError:  # the errors of gloo and NCCL have no class of their own
        if not watch.lost.wait(2):
            watch.close(done=False)
            raise
        sys.exit(1)  # the sentence has been printed
    except BaseException:
        watch.close(done=False)
        raise
    watch.close(done=True)


def _connect(accelerator: Accelerator) -> dict[int, socket.socket]:
    """Connections by rank: the first process has one to every other, the others one to the first."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if accelerator.is_main_process:
        with socket.create_server(("", 0)) as server:
            broadcast_object_list([server.getsockname()[1]])
            links = {}
            for _ in range(accelerator.num_processes - 1):
                link, _ = server.accept()
                links[int.from_bytes(link.recv(4), "big")] = link
            return links
    port: list[int] = broadcast_object_list([0])
    link = socket.create_connection((host, port[0]), timeout=60)
    link.settimeout(None)
    link.sendall(accelerator.process_index.to_bytes(4, "big"))
    return {0: link}
