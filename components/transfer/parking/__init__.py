# SPDX-License-Identifier: Apache-2.0
"""KV of requests put aside: into pinned host memory or into files, and brought back.

parking.py  Parking: park, restore, discard, tickets, stats
ticket.py   what brings a parked request back, and its form in a file
host.py     the host memory
files.py    the files: transfers between slots and files
folder.py   the folder: names, bounds, creation, checks
fileio.py   how bytes get into a file: NIXL's POSIX plugin or plain calls
loading.py  chunks of blocks between the pools and host memory
"""

from components.transfer.parking.parking import Parking, ParkingStats
from components.transfer.parking.ticket import Place, Ticket

__all__ = ["Parking", "ParkingStats", "Place", "Ticket"]
