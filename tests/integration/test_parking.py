# SPDX-License-Identifier: Apache-2.0
"""Requests' KV parked in host memory and in files (NIXL's POSIX plugin and plain calls), and brought back."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.errors import (
    ConfigError,
    DeadlineExceeded,
    IncompatibleLayout,
    IntegrityError,
    MigrateError,
    NoRoom,
    RequestNotFound,
    StaleEpoch,
    TransferError,
    TransferUnavailable,
)
from components.transfer import AgentConfig, KVPool, Place, Ticket, TransferAgent, TransferResult, nixl_is_available
from components.transfer.parking import fileio
from components.transfer.parking import ticket as tickets
from components.transfer.parking.parking import ParkingStats

pytestmark = pytest.mark.integration
BLOCKS, WIDTH = 64, 300_000
"""Blocks of 0.9 MB over three layers: four of them are stored together."""
WAYS = {"host": Place.HOST, "nixl": Place.FILE, "plain": Place.FILE}
LANES = {"host": "host/memory", "nixl": "nixl/posix", "plain": "file/plain"}


class One:
    """An agent with pools of numbers that differ everywhere, parking in a folder of its own."""

    def __init__(self, folder: Path, way: str = "plain", name: str = "one", **more: object) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (BLOCKS, WIDTH)
        self.parts = [
            KVPool(f"layer.{n}", torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator), BLOCKS, 0)
            for n in range(3)
        ]
        self.folder = folder
        values: dict[str, object] = {
            "park_dir": str(folder),
            "park_host_bytes": 64 << 20,
            "namespace": uuid.uuid4().hex,
        }
        backends = ("nixl",) if way == "nixl" else ("local",)
        self.agent = TransferAgent(AgentConfig(name=name, **(values | {"backends": backends} | more)))  # type: ignore[arg-type]
        self.agent.start(self.parts)
        self.place = WAYS[way]

    def data(self, blocks: list[int]) -> list[torch.Tensor]:
        return [part.tensor[blocks].clone() for part in self.parts]

    def park(self, blocks: list[int], **more: object) -> Ticket:
        values: dict[str, object] = {"request_id": "r", "deadline_s": 20.0}
        done = self.agent.parking.park(self.place, blocks, **(values | more)).wait(30)  # type: ignore[arg-type]
        assert done.ticket is not None
        return done.ticket

    def restore(self, ticket: Ticket, blocks: list[int], **more: object) -> TransferResult:
        return self.agent.parking.restore(ticket, blocks, deadline_s=20.0, **more).wait(30)  # type: ignore[arg-type]

    def until(self, told: Callable[[ParkingStats], bool]) -> None:
        """Figures are counted after whoever waits for the transfer has been woken."""
        end = time.monotonic() + 20
        while not told(self.agent.parking.stats()):
            assert time.monotonic() < end, self.agent.parking.stats()
            time.sleep(0.001)

    def file(self) -> Path:
        [found] = self.folder.glob("*.kv")
        return found


@pytest.fixture(scope="module", params=WAYS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[One, str]]:
    if request.param == "nixl" and not nixl_is_available()[0]:
        pytest.skip(nixl_is_available()[1])
    made = One(tmp_path_factory.mktemp("park"), request.param)
    yield made, request.param
    made.agent.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[One]:
    made = One(tmp_path / "park")
    yield made
    made.agent.close()


@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_parked_comes_back_into_other_blocks(one: tuple[One, str], data: st.DataObject) -> None:
    made, way = one
    count = data.draw(st.integers(1, 20))
    blocks = data.draw(st.lists(st.integers(0, BLOCKS - 1), min_size=count, max_size=count))
    target = data.draw(st.lists(st.integers(0, BLOCKS - 1), unique=True, min_size=count, max_size=count))
    others = sorted(set(range(BLOCKS)) - set(target))
    before = made.agent.parking.stats()
    kept = made.data(blocks)
    ticket = made.park(blocks, tokens=7, block_hashes=[bytes([n]) for n in range(count)])
    assert (ticket.tokens, ticket.request_id, ticket.epoch) == (7, "r", made.agent.epoch)
    assert made.agent.parking.tickets() == [ticket]
    for part in made.parts:
        part.tensor[target] = 1
    untouched = made.data(others)
    done = made.restore(ticket, target, block_hashes=ticket.hashes)
    assert (done.lane, done.bytes, done.verified_blocks) == (LANES[way], count * 3 * WIDTH, count)
    assert all(torch.equal(a, b) for a, b in zip(kept, made.data(target), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(untouched, made.data(others), strict=True))
    assert made.agent.parking.tickets() == [] and made.agent.parking.stats().used_bytes[made.place] == 0
    made.until(lambda after: (after.parked - before.parked, after.restored - before.restored) == (1, 1))


def test_a_kept_request_can_be_restored_again_and_is_gone_when_discarded(one: tuple[One, str]) -> None:
    made, _ = one
    ticket = made.park([1, 2, 3])
    made.restore(ticket, [4, 5, 6], keep=True)
    made.restore(ticket, [7, 8, 9], keep=True)
    made.agent.parking.discard(ticket).wait(20)
    made.agent.parking.discard(ticket).wait(20)
    with pytest.raises(RequestNotFound):
        made.restore(ticket, [4, 5, 6])
    assert made.agent.parking.stats().used_bytes[made.place] == 0


def test_what_does_not_fit_is_refused_before_a_byte_moves(one: tuple[One, str]) -> None:
    made, _ = one
    ticket = made.park([1, 2], block_hashes=[b"a", b"b"])
    before = made.data(list(range(BLOCKS)))
    cases: list[tuple[Ticket, list[int], dict[str, object], type[MigrateError]]] = [
        (ticket, [1], {}, TransferError),
        (ticket, [1, BLOCKS], {}, TransferError),
        (ticket, [1, 1], {}, TransferError),
        (ticket, [1, 2], {"block_hashes": [b"a", b"c"]}, IntegrityError),
        (msgspec.structs.replace(ticket, epoch="older"), [1, 2], {}, StaleEpoch),
        (msgspec.structs.replace(ticket, fingerprint="another"), [1, 2], {}, IncompatibleLayout),
        (msgspec.structs.replace(ticket, layout="another"), [1, 2], {}, IncompatibleLayout),
        (msgspec.structs.replace(ticket, tokens=3), [1, 2], {}, IntegrityError),
    ]
    for wrong, blocks, more, error in cases:
        with pytest.raises(error):
            made.restore(wrong, blocks, **more)
    with pytest.raises(TransferError):
        made.park([BLOCKS])
    assert all(torch.equal(a, b) for a, b in zip(before, made.data(list(range(BLOCKS))), strict=True))
    assert made.agent.parking.stats().failures["stale_epoch"] == 1
    made.agent.parking.discard(ticket).wait(20)


def test_a_deadline_leaves_nothing_behind(one: tuple[One, str]) -> None:
    made, _ = one
    with pytest.raises(DeadlineExceeded):
        made.park(list(range(60)), deadline_s=0.0)
    made.restore(made.park([3]), [4])
    assert made.agent.parking.stats().used_bytes[made.place] == 0


@pytest.mark.parametrize("way", ["nixl", "plain"])
@pytest.mark.parametrize("damage", ["cut", "cut blocks", "changed block", "changed ticket", "longer", "empty", "other"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, way: str, damage: str) -> None:
    if way == "nixl" and not nixl_is_available()[0]:
        pytest.skip(nixl_is_available()[1])
    made = One(tmp_path / "park", way)
    try:
        ticket = made.park(list(range(10)))
        path = made.file()
        data = bytearray(path.read_bytes())
        if damage == "changed block":
            data[4_000_000] ^= 1
        elif damage == "changed ticket":
            data[ticket.total_bytes + 40] ^= 1
        elif damage == "other":
            other = msgspec.structs.replace(ticket, id="0" * 32)
            data[ticket.total_bytes :] = tickets.pack(other)
        else:
            cuts = {"cut": data[:-5], "cut blocks": data[1000:], "longer": data + b"x", "empty": bytearray()}
            data = cuts[damage]
        path.write_bytes(data)
        with pytest.raises(
            IntegrityError, match=ticket.id if damage != "changed block" else "block 5 of parked request r"
        ):
            made.restore(ticket, list(range(20, 30)))
        made.until(lambda stats: stats.failures == {"integrity": 1})
        assert path.exists()
    finally:
        made.agent.close()


def test_a_file_survives_its_agent_and_is_refused_by_another_model(tmp_path: Path) -> None:
    first = One(tmp_path / "park")
    data, ticket = first.data([1, 2]), first.park([1, 2])
    with pytest.raises(StaleEpoch):
        lost = first.agent.parking.park(Place.HOST, [1], request_id="m", deadline_s=10).wait(20).ticket
        assert lost is not None
        first.agent.close()
        second = One(tmp_path / "park", name="two")
        second.restore(lost, [1])
    assert second.agent.parking.tickets() == [ticket]
    second.restore(ticket, [8, 9])
    assert all(torch.equal(a, b) for a, b in zip(data, second.data([8, 9]), strict=True))
    ticket = second.park([1, 2])
    third = One(tmp_path / "park", name="three", fingerprint="another")
    with pytest.raises(IncompatibleLayout, match="fingerprint"):
        third.restore(ticket, [1, 2])
    second.agent.close()
    third.agent.close()


def test_bounds_are_kept_in_memory_and_in_the_folder(tmp_path: Path) -> None:
    made = One(tmp_path / "park", park_host_bytes=8 << 20, park_dir_bytes=8 << 20)
    for place, setting in ((Place.HOST, "park_host_bytes"), (Place.FILE, "park_dir_bytes")):
        made.place = place
        ticket = made.park([1, 2, 3, 4])
        with pytest.raises(NoRoom, match=setting):
            made.park(list(range(6)))
        made.restore(ticket, [1, 2, 3, 4])
        made.agent.parking.discard(made.park(list(range(5)))).wait(20)
    assert made.agent.parking.stats().failures == {"no_room": 2}
    assert list(made.folder.iterdir()) == []
    made.agent.close()


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    # A file system of 4 MiB, in a mount namespace of its own.
    code = (
        "import sys\nfrom pathlib import Path\nfrom components.errors import NoRoom\n"
        "from tests.integration.test_parking import One\n"
        "one = One(Path(sys.argv[1]))\n"
        "try:\n    one.park(list(range(8)))\nexcept NoRoom as error:\n    print('refused:', error)\n"
        "one.restore(one.park([1]), [2])\n"
        "print(one.agent.parking.stats().failures, list(one.folder.iterdir()))\n"
        "one.agent.close()\n"
    )
    mount = f'mount -t tmpfs -o size=4m,mode=0700 none "{tmp_path}" && exec "{sys.executable}" -c "$1" "{tmp_path}"'
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted here")
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", code], capture_output=True, text=True, timeout=120)
    assert "No space left on device" in done.stdout and "MiB are free" in done.stdout, done.stderr
    assert "{'no_room': 1} []" in done.stdout


@pytest.mark.parametrize("way", ["nixl", "plain"])
def test_a_limit_that_only_the_ticket_exceeds_leaves_nothing(tmp_path: Path, way: str) -> None:
    if way == "nixl" and not nixl_is_available()[0]:
        pytest.skip(nixl_is_available()[1])
    made = One(tmp_path / "park", way)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 3 * WIDTH, before[1]))
        with pytest.raises(NoRoom, match="File too large"):
            made.park([1, 2, 3, 4])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    data = made.data([1, 2, 3, 4])
    made.restore(made.park([1, 2, 3, 4]), [5, 6, 7, 8])
    assert all(torch.equal(a, b) for a, b in zip(data, made.data([5, 6, 7, 8]), strict=True))
    assert list(made.folder.iterdir()) == [] and made.agent.parking.stats().failures == {"no_room": 1}
    made.agent.close()


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "no_room"), (errno.EDQUOT, "no_room"), (errno.EIO, "")])
def test_a_disk_that_fails_in_the_middle_leaves_nothing(
    plain: One, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    # Room that was promised and is not there: thin volumes, quotas of network file systems, broken disks.
    written, write = [], fileio.PlainFiles.write

    def fails(self: fileio.PlainFiles, fd: int, offset: int, memory: torch.Tensor) -> None:
        written.append(offset)
        if len(written) > 2:
            raise OSError(number, os.strerror(number))
        write(self, fd, offset, memory)

    monkeypatch.setattr(fileio.PlainFiles, "write", fails)
    with pytest.raises(NoRoom if code else TransferError, match=os.strerror(number)) as caught:
        plain.park(list(range(40)))
    assert str(plain.folder) in str(caught.value)
    monkeypatch.undo()
    data = plain.data([1, 2])
    plain.restore(plain.park([1, 2]), [5, 6])
    assert all(torch.equal(a, b) for a, b in zip(data, plain.data([5, 6]), strict=True))
    assert list(plain.folder.iterdir()) == []
    assert list(plain.agent.parking.stats().failures) == [code or "transfer"]


def test_no_name_leaves_the_folder(plain: One, tmp_path: Path) -> None:
    (tmp_path / "outside.kv").write_bytes(b"precious")
    ticket = plain.park([1], request_id="../../outside")
    assert [path.parent for path in plain.folder.iterdir()] == [plain.folder]
    for name in ("../outside", "/etc/passwd", "", "0" * 33, "A" * 32):
        with pytest.raises(ConfigError, match="32 hexadecimal"):
            plain.restore(msgspec.structs.replace(ticket, id=name), [1])
        with pytest.raises(ConfigError, match="32 hexadecimal"):
            plain.agent.parking.discard(msgspec.structs.replace(ticket, id=name)).wait(20)
    # A link in the folder is no way out either.
    (plain.folder / f"{'1' * 32}.kv").symlink_to(tmp_path / "outside.kv")
    with pytest.raises(TransferError):
        plain.restore(msgspec.structs.replace(ticket, id="1" * 32), [1])
    assert (tmp_path / "outside.kv").read_bytes() == b"precious"


def test_files_and_folder_are_the_users_alone(tmp_path: Path) -> None:
    made = One(tmp_path / "park")
    made.park([1])
    assert (made.folder.stat().st_mode & 0o777, made.file().stat().st_mode & 0o777) == (0o700, 0o600)
    made.agent.close()
    made.folder.chmod(0o777)
    with pytest.raises(ConfigError, match="nobody else"):
        One(tmp_path / "park")


def test_a_part_of_a_writer_that_died_is_removed_and_one_of_a_living_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "park"
    folder.mkdir(mode=0o700)
    (folder / f"{'2' * 32}.part").write_bytes(b"x")
    living = folder / f"{'3' * 32}.part"
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(living)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        made = One(folder)
        assert list(folder.iterdir()) == [living]
        made.agent.close()
        writer.communicate(b"\n")


def test_without_a_place_the_error_names_the_setting(tmp_path: Path) -> None:
    made = One(tmp_path / "park", park_dir="", park_host_bytes=0)
    for place, setting in ((Place.HOST, "park_host_bytes"), (Place.FILE, "park_dir")):
        made.place = place
        with pytest.raises(TransferUnavailable, match=setting):
            made.park([1])
    made.agent.close()


def test_without_the_posix_plugin_files_are_written_with_plain_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fileio, "NixlFiles", _missing)
    made = One(tmp_path / "park", "nixl")
    assert made.restore(made.park([1]), [2]).lane == "file/plain"
    made.agent.close()


def _missing(*_: object) -> None:
    raise RuntimeError("no such plugin")


def test_no_descriptors_are_left(plain: One) -> None:
    plain.restore(plain.park([1]), [2])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        plain.restore(plain.park([1, 2, 3]), [4, 5, 6])
        with pytest.raises(DeadlineExceeded):
            plain.park(list(range(50)), deadline_s=0.0)
    plain.restore(plain.park([1]), [2])
    assert len(os.listdir("/proc/self/fd")) <= before
