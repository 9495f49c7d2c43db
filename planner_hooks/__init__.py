# SPDX-License-Identifier: Apache-2.0
"""Policies that decide which running request moves where, and their place in Dynamo's planner.

observe  -> snapshot -> policies -> plan -> controller -> migration commands
               ^                                  |
               '------- outcomes, bandwidth ------'

snapshot.py, plan.py    what a policy is given and what it answers
rules.py, ledger.py     limits and costs that all policies share; bookkeeping of one plan
policies/               one policy per file; compose.py runs several
config.py               the policy file
observe.py, metrics.py  live state of workers, forward-pass metrics
controller.py           carries plans out
scaledown.py            whether and when there may be one worker fewer
decider.py              one decision for all plugins of a process
plugin.py, server.py    Dynamo planner plugin, in-process and over gRPC
simulate/               the same policies on simulated workers
"""
