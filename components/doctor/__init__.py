# SPDX-License-Identifier: Apache-2.0
"""``dynamo doctor``: what this machine and installation can do, and the fix for what they cannot.

check.py     one line of the answer
host.py      facts of the host and the installation, gathered once
judge.py     facts to lines; pure
places.py    checks of folders
services.py  checks of etcd, NATS and ports
transfer.py  a real transfer between two processes, and the lane that UCX took for it
"""
