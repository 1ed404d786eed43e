"""The replicas to which Serve sends requests, as last told to this process.

A module of its own, because Ray ships a custom request router and an ingress class with their whole modules by value:
each gets its own copy of what is global there. This one they import by its name, and so share.
"""

from ray.serve._private.request_router.replica_wrapper import RunningReplica

BY_DEPLOYMENT: dict[str, dict[str, RunningReplica]] = {}
"""Deployment -> its replicas by their unique ids."""
