# SPDX-License-Identifier: Apache-2.0
"""The policies, one per file. Each module has ``Config`` (a ``PolicyConfig``) and ``POLICY``, its class.

A policy of your own is one such module anywhere on the path, named in the policy file:

    policies:
      spread: {module: my_package.spread}
"""

BUILT_IN = {
    "consolidate": "planner_hooks.policies.consolidate",
    "defragment": "planner_hooks.policies.defragment",
    "priority": "planner_hooks.policies.priority",
    "balance": "planner_hooks.policies.balance",
}
"""Name to module, in the order in which they are best composed: what must be before what would be nice."""
