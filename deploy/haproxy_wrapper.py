"""Runs as a script in place of the `haproxy` binary: adjusts the configuration that Ray Serve wrote, then becomes it.

Needs nothing but the standard library, because it is started without the environment. What it changes:

- HAProxy ends with its parent. Otherwise it would outlive a killed one and keep the port.
- Its statistics page goes to the loopback, and its metrics where nothing shall scrape them from outside; Ray binds
  both to every interface.
- A replica that fails before the first byte of its answer is replaced by another one, once: HAProxy sends the request
  back to itself through a socket, marked, and so asks the router again. Ray's own retry would take any replica,
  without asking whether it has room, under the reservation of the one that failed.
- What HAProxy itself answers has OpenAI's shape, and says when to come back. Only where it cannot read a request's head
  it answers its own HTML, which HAProxy 2.8 leaves nobody to change.
- Who sends no whole head in time is cut off: HAProxy would wait for an hour, and an old one of it would not end.
- While no router can be reached, Serve's own balancing takes the requests, where Ray would answer 503.
- Buffers as large as the largest body are kept and used again: HAProxy copies a whole one at every request that it may
  have to send again, and by default gives each back to the kernel, which fills it with zeros at its next use.
- The router is told the request's path and API key, beside its body.
- A client's request id that is no ASCII, at which Serve would fail, is replaced by one of HAProxy's.
- No client can set the router's headers, whether there is a router or not, nor those by which Serve would give up a
  request early or not notice that its client left.
- While HAProxy knows of no application, as right after it was started anew, it answers 503, where Ray would say 404 to
  every path.
- While no replica is there, as before the first engine is up, it answers 503 as well, `/-/healthz` too. Ray would hold
  every request in a Python proxy on the head, which asks no router: without a limit, and with the first replica all at
  once and unbooked onto that one.

    client -> frontend -> router -> backend -> replica 1 (fails)
                 ^                     |
                 +---- again.sock <----+      then: frontend -> router -> backend -> replica 2
"""

import ctypes
import os
import re
import signal
import sys

PR_SET_PDEATHSIG = 1
# Listener id of the socket through which a request comes back.
AGAIN_ID = 7
AGAIN_PREFIX = "again:"
"""Begins the x-request-id by which the router knows a request that came back. The failed reservation follows, and then
a colon and the seconds that it had waited."""

ASKED = "x-trifleet-asked"
"""The header that HAProxy's Lua code hands to the router: the path, a space, and the client's Authorization in Base64,
because Serve would fail at bytes there that are no UTF-8."""

ANSWERED = (400, 408, 500, 502, 503, 504)
"""What HAProxy answers by itself."""

KEPT_BYTES = 32 * 1024 * 1024
"""Of free buffers, by each of HAProxy's threads."""

HEAD_SECONDS = 30
"""For a request's head. A body's time is the router's."""

_FRONTEND_RULES = f"""\
    bind unix@{{socket}} id {AGAIN_ID}
    acl came_back so_id {AGAIN_ID}
    acl came_back_before req.hdr(x-trifleet-again) -m found
    http-request deny deny_status 503 if came_back came_back_before
    http-request del-header x-trifleet-again if !came_back
    http-request set-header x-trifleet-again 1 if came_back
    http-request del-header x-request-id if !came_back {{{{ req.hdr(x-request-id) -m beg {AGAIN_PREFIX} }}}}
    http-request del-header x-request-id if {{{{ req.fhdr(x-request-id) -m reg '[^ -~]' }}}}
    http-request set-header x-request-id {AGAIN_PREFIX}%[req.hdr(x-serve-router-reservation)]:\
%[req.hdr(x-serve-router-waited)] if came_back
    http-request del-header x-serve-router- -m beg
    http-request del-header x-request-timeout-seconds
    http-request del-header x-request-disconnect-disabled
"""
_ROUTING = r"^ *http-request lua\.route_via_ingress_request_router .*\n"
_TOLD = f"""\
    http-request set-header {ASKED} "%[path] %[req.fhdr(authorization,1),base64]"
\\g<0>    http-request del-header {ASKED}
"""
_ROUTER_FAILED = "if { var(txn.ingress_request_router_failed) -m found }"
_FRONTEND = r"^frontend http_frontend\n *bind .*\n"
_PINNED_BACKEND = re.compile(r"^backend \S+-via-ingress-request-router\n(?:(?: .*)?\n)+", re.MULTILINE)
_NO_REPLICA = re.compile(r"(^ *# Servers in this backend\n) *# Fallback .*\n *server .* backup\n", re.MULTILINE)
_NO_APPLICATION = r"(?<=^backend default_backend\n)    http-request return status 404 .*$"
_FAILED_ANSWER = r'return status 503 content-type text/plain lf-string ".*?"(?= hdr X-Serve-Reason )'
_ERROR_FILES = r"(?:^ *errorfile 50[234] .*\n)+"
_BUFFERS = r"^ *tune\.bufsize \d+\n"
REWRITE_BYTES = 32 * 1024
"""Kept free of a request's body in its buffer, for the headers that are added."""
_UNREACHABLE = "{ var(txn.ingress_request_router_failed) -m str router_unreachable }"


def adjusted(config: str, loopback: list[int], socket: str, answers: str) -> str:
    """The configuration with all changes made. Raises ValueError where Ray's template is not as expected.

    `answers`: the folder of `400.http` and so on, and of `503.json`.
    """
    for port in loopback:
        config = _once(config, rf"bind \*?:{port}\b", f"bind 127.0.0.1:{port}")
    own = "".join(f"    errorfile {status} {answers}/{status}.http\n" for status in ANSWERED)
    # A load balancer that opens a connection and sends nothing on it is no error.
    patience = f"    timeout http-request {HEAD_SECONDS}s\n    option http-ignore-probes\n"
    config = _once(config, _ERROR_FILES, own + patience)
    config = _once(config, _BUFFERS, rf"\g<0>    tune.memory.hot-size {KEPT_BYTES}\n")
    config = _once(config, _NO_APPLICATION, "    http-request deny deny_status 503")
    config = _once(config, _FRONTEND, rf"\g<0>{_FRONTEND_RULES.format(socket=socket)}")
    if _ROUTER_FAILED in config:
        config = _once(config, _ROUTING, _TOLD)
        # Without a router the buffers are small, and no body is held.
        config = _once(config, _BUFFERS, rf"\g<0>    tune.maxrewrite {REWRITE_BYTES}\n")
        config = config.replace(_ROUTER_FAILED, f"{_ROUTER_FAILED} !{_UNREACHABLE}")
        answer = f"return status 503 content-type application/json file {answers}/503.json hdr Retry-After 1"
        config = _once(config, _FAILED_ANSWER, answer)
    config = _NO_REPLICA.sub(r"\1", config)
    return re.sub(_PINNED_BACKEND, lambda found: _only_pinned(found.group(), socket), config)


def _only_pinned(backend: str, socket: str) -> str:
    """Weight 0: a replica is taken because the router named it, and never by HAProxy's own choice.

    What HAProxy chooses instead, when the named one is down or fails, is the way back to the frontend.
    """
    backend = re.sub(r"( +server \S+ \S+ track \S+)\n", r"\1 weight 0\n", backend)
    return f"{backend.rstrip()}\n    server again unix@{socket}\n"


def _once(config: str, pattern: str, new: str) -> str:
    config, times = re.subn(pattern, new, config, flags=re.MULTILINE)
    if times != 1:
        raise ValueError(f"HAProxy's configuration has `{pattern}` {times} times: this Ray is not the pinned one")
    return config


def main(arguments: list[str]) -> None:
    """`LOOPBACK_PORTS ANSWERS BINARY`, ports with commas, and then HAProxy's own arguments."""
    ports, answers, binary, *own = arguments
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    path = own[own.index("-f") + 1]
    # Beside the configuration, of which Ray writes one for each node: two nodes may be on one machine.
    socket = os.path.join(os.path.dirname(path), "again.sock")
    with open(path) as file:
        config = adjusted(file.read(), [int(port) for port in ports.split(",")], socket, answers)
    with open(path, "w") as file:
        file.write(config)
    os.execv(binary, [binary, *own])


if __name__ == "__main__":
    main(sys.argv[1:])
