# SPDX-License-Identifier: Apache-2.0
"""Policies that decide which running requests move, and where; their plugins for Dynamo's planner.

observe  -> snapshot -> policies -> plan -> controller -> migration commands
               ^                                  |
               '------- outcomes, bandwidth ------'

snapshot.py, plan.py    input and output of a policy
rules.py, ledger.py     limits and costs of all policies; bookkeeping of one plan
policies/               one policy per file; compose.py runs several
config.py               the policy file
observe.py, metrics.py  live state of workers, forward-pass metrics
controller.py           carries plans out
scaledown.py            decides when there may be one worker fewer
decider.py              one decision for all plugins of a process
plugin.py, server.py    Dynamo planner plugin, in-process and over gRPC
simulate/               the same policies on simulated workers
"""
