# SPDX-License-Identifier: Apache-2.0
"""The parking folder: its files, its bound, and the checks before a file is trusted.

A file is written as ``<id>.part``, with room for all of it reserved before the first byte, and renamed when it is
complete. Names are ticket ids (32 hexadecimal digits), relative to the open folder; links are not followed. The
folder must belong to this user and be writable by nobody else. Agents may share it: the bound is for all of them, and
the next agent that starts removes a ``.part`` whose writer has died.
Threading: any one thread at a time; all calls block on the disk. Errors: ``ConfigError`` for the folder itself;
``NoRoom`` when the bound or the disk is full, ``RequestNotFound``, ``IntegrityError``, ``TransferError`` for files.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from components.errors import ConfigError, IntegrityError, MigrateError, NoRoom, RequestNotFound, TransferError
from components.transfer.parking import ticket as tickets
from components.transfer.parking.ticket import Ticket

logger = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Folder:
    """See the module docstring."""

    def __init__(self, path: str, limit_bytes: int) -> None:
        self.path = Path(path)
        self.limit_bytes = limit_bytes
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"park_dir {path}: {error.strerror}") from error
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            os.close(self._fd)
            raise ConfigError(f"park_dir {path} must belong to user {os.geteuid()} and be writable by nobody else")
        self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        for name in os.listdir(self._fd):
            if not name.endswith(".part"):
                continue
            with suppress(OSError):
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # A writer that lives holds this lock.
                    os.unlink(name, dir_fd=self._fd)
                    logger.info("%s: removed %s, whose writer has ended", self.path, name)
                finally:
                    os.close(fd)

    def used_bytes(self) -> int:
        """Bytes of all files in the folder."""
        total = 0
        with os.scandir(self._fd) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
        return total

    def tickets(self) -> list[Ticket]:
        """Tickets of all complete files; unreadable ones are logged and stay."""
        found = []
        for name in sorted(os.listdir(self._fd)):
            if not name.endswith(".kv"):
                continue
            try:
                with self.opened(name.removesuffix(".kv")) as (_, ticket):
                    found.append(ticket)
            except MigrateError as error:
                logger.warning("parked file %s: %s", self.path / name, error)
        return found

    def create(self, name: str, size: int) -> int:
        """Descriptor of a new ``.part`` with room for ``size`` bytes."""
        # The folder's lock: two agents must not both take the last room.
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            used = self.used_bytes()
            if used + size > self.limit_bytes:
                raise NoRoom(
                    f"{size >> 20} MiB cannot be parked in {self.path}: {used >> 20} of {self.limit_bytes >> 20} MiB "
                    "are taken (park_dir_bytes)"
                )
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with self.errors(name):
                fd = os.open(f"{name}.part", flags, 0o600, dir_fd=self._fd)
            try:
                with self.errors(name):
                    fcntl.flock(fd, fcntl.LOCK_EX)
                    os.posix_fallocate(fd, 0, max(1, size))
            except BaseException:
                self.remove(name)
                os.close(fd)
                raise
            return fd
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def commit(self, name: str, fd: int, ticket: Ticket) -> None:
        """Add the ticket and give the file its name."""
        data = tickets.pack(ticket)
        with self.errors(name):
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], ticket.total_bytes + done)
            os.ftruncate(fd, ticket.total_bytes + len(data))
            os.rename(f"{name}.part", f"{name}.kv", src_dir_fd=self._fd, dst_dir_fd=self._fd)

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, Ticket]]:
        """Open a complete file: its descriptor and ticket."""
        with ExitStack() as held:
            with self.errors(name):
                fd = os.open(f"{name}.kv", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
                held.callback(os.close, fd)
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise IntegrityError("it is no file")
                end = max(0, found.st_size - tickets.TRAILER.size)
                length, check = tickets.unpack_trailer(os.pread(fd, tickets.TRAILER.size, end), found.st_size)
                ticket = tickets.unpack(os.pread(fd, length, end - length), check)
                if ticket.id != name or ticket.total_bytes != end - length:
                    raise IntegrityError("its ticket is another file's")
            yield fd, ticket

    def remove(self, name: str) -> bool:
        """Remove a file, complete or not. False when there is none."""
        removed = False
        for suffix in (".part", ".kv"):
            with suppress(FileNotFoundError):
                os.unlink(name + suffix, dir_fd=self._fd)
                removed = True
        return removed

    @contextmanager
    def errors(self, name: str) -> Iterator[None]:
        """Context of calls for a file: turns system errors into this package's."""
        where = self.path / f"{name}.kv"
        try:
            yield
        except FileNotFoundError as error:
            raise RequestNotFound(f"no parked request in {where}") from error
        except OSError as error:
            if error.errno in _FULL:
                free = os.fstatvfs(self._fd)
                raise NoRoom(
                    f"{where} cannot be written: {error.strerror}, {free.f_bavail * free.f_frsize >> 20} MiB are free"
                ) from error
            raise TransferError(f"{where}: {error.strerror}") from error
        except IntegrityError as error:
            raise IntegrityError(f"{where}: {error}") from error

    def close(self) -> None:
        """Close the folder."""
        os.close(self._fd)
