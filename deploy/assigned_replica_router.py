"""Serve's own request router, told by the coordinator. It notes which replicas Serve sends to in `deploy.listed`."""

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from deploy import listed


class AssignedReplicaRouter(PowerOfTwoChoicesRequestRouter):
    """Resolves the replica that the coordinator assigned: the first routing argument, a replica's unique id.

    Without one, or when Serve does not know that replica (any more), it is the power of two choices.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is not None and pending_request.args:
            assigned = pending_request.args[0]
            for replica in candidate_replicas:
                if replica.replica_id.unique_id == assigned:
                    return [[replica]]
        return await super().choose_replicas(candidate_replicas, pending_request)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        names = frozenset(replica.replica_id.to_full_id_str() for replica in replicas)
        listed.BY_DEPLOYMENT[self._deployment_id.name] = names
