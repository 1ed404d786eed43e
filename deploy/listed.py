"""The replicas to which Serve sends requests, as last told to this process.

A module of its own, because Ray ships a custom request router and an ingress class with their whole modules by value:
each gets its own copy of what is global there. This one they import by its name, and so share.
"""

BY_DEPLOYMENT: dict[str, frozenset[str]] = {}
"""Deployment -> full ids of its replicas."""
