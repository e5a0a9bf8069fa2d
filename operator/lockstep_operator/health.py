"""The operator's two small HTTP servers: /metrics for Prometheus, /healthz for the kubelet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest


@asynccontextmanager
async def serve(
    host: str, *, metrics_port: int, health_port: int, registry: CollectorRegistry, healthy: Callable[[], bool]
) -> AsyncIterator[None]:
    """Serve while the context is open."""

    async def metrics(_: web.Request) -> web.Response:
        body: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]  # the library has no types there
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        if healthy():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the watch of pods is silent\n")

    runners = []
    try:
        for port, path, handler in ((metrics_port, "/metrics", metrics), (health_port, "/healthz", healthz)):
            app = web.Application()
            app.router.add_get(path, handler)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, host, port).start()
        yield
    finally:
        for runner in runners:
            await runner.cleanup()
