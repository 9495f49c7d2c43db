# SPDX-License-Identifier: Apache-2.0
"""Policies, one per file. Each module has ``Config`` (a ``PolicyConfig``) and ``POLICY``, its class.

Your own policy is one such module anywhere on the path, named in the policy file:

    policies:
      spread: {module: my_package.spread}
"""

BUILT_IN = {
    "consolidate": "planner_hooks.policies.consolidate",
    "defragment": "planner_hooks.policies.defragment",
    "balance": "planner_hooks.policies.balance",
}
"""Names and modules in the best order of composition: the necessary before the useful."""
