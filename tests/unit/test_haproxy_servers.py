"""Which replicas HAProxy can reach, read from what it prints."""

from deploy.haproxy_servers import servers_up

HEAD = "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight"
STATE = f"""{HEAD}
3 http-trifleet 1 SERVE_REPLICA__trifleet-replica-a 127.0.0.1 2 0 1 1
4 http-trifleet-via-ingress-request-router 1 SERVE_REPLICA__trifleet-replica-b 127.0.0.1 2 0 0 1
4 http-trifleet-via-ingress-request-router 2 SERVE_REPLICA__trifleet-replica-c 127.0.0.1 0 0 0 1
4 http-trifleet-via-ingress-request-router 3 again - 2 0 1 1

"""


def test_a_server_counts_where_the_router_can_name_it_and_it_is_up() -> None:
    assert servers_up(STATE) == {"SERVE_REPLICA__trifleet-replica-b", "again"}


def test_without_a_router_in_the_configuration_nothing_is_reachable() -> None:
    assert servers_up(f"{HEAD}\n3 http-trifleet 1 a 127.0.0.1 2 0 1 1\n") == frozenset()
