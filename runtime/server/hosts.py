"""A server for this machine alone: no page of another site may reach it by a name that leads here."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rk_export.runtime.server.errors import ApiError


class LocalHosts:
    """Refuses requests to a name that is none of this machine's own.

    A browser lets a page talk to the page's own host, and its owner may let that name lead to a loopback address. The
    header Host still tells the name.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if host and not is_local(_without_port(host)):
            error = ApiError(
                403,
                "this server answers requests to localhost only; a proxy must send Host: localhost, or the server"
                " be given API keys",
                code="host_not_allowed",
            )
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_local(host: str) -> bool:
    """Return whether a name or an address is this machine's alone: localhost, 127.0.0.0/8 or ::1."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
