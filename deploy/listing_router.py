"""Serve's own request router, which also notes in `deploy.listed` which replicas Serve sends to."""

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from deploy import listed


class ListingRouter(PowerOfTwoChoicesRequestRouter):
    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        listed.BY_DEPLOYMENT[self._deployment_id.name] = {replica.replica_id.unique_id: replica for replica in replicas}
