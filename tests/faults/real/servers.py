# SPDX-License-Identifier: Apache-2.0
"""etcd and NATS of a system under test: killed, started again with or without their data, stopped and continued."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

from components.serve.servers import etcd_command, free_port, nats_command
from tests.conftest import wait_for_port


class Server:
    """One server process on a port that stays."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.port = free_port()
        self._peer = free_port()
        self._data = folder / name
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """For clients."""
        return f"{'http' if self.name == 'etcd' else 'nats'}://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        if self.name == "nats":
            return nats_command(self._data, self.port)
        return etcd_command(self._data, self.url, self._peer)

    def start(self) -> None:
        """Listen again."""
        self._process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_port(self.port)

    def kill(self, empty: bool) -> None:
        """As kill -9; with ``empty`` its data go, too."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if empty:
            shutil.rmtree(self._data, ignore_errors=True)

    def pause(self, stopped: bool) -> None:
        """As SIGSTOP and SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)
