"""Scoring policies: which cached tokens of a KV head are worth keeping. One file a policy; importing lists them."""

from triattention.policies.base import Policy, PolicyContext, create_policy, policy_names, register
from triattention.policies.key_norm import KeyNorm
from triattention.policies.keydiff import KeyDiff
from triattention.policies.random import Random
from triattention.policies.streaming import Streaming
from triattention.policies.triattention import TriAttention

__all__ = [
    "KeyDiff",
    "KeyNorm",
    "Policy",
    "PolicyContext",
    "Random",
    "Streaming",
    "TriAttention",
    "create_policy",
    "policy_names",
    "register",
]
