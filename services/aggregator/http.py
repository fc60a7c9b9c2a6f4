"""HTTP for people and machines that watch: health and metrics, a read API in JSON, and a dashboard made of it.

Nothing can be changed here, and nobody is asked who they are: the address belongs on a loopback or internal interface.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CollectorRegistry

from services.aggregator.read_api import Json, agent_json, federation_json, round_json
from services.aggregator.service import AggregatorService
from services.common.health import Ready
from services.common.ops import ops_app
from shelora.errors import NotFound, SheLoraError

_Number = Annotated[int, Query(ge=0, le=(1 << 31) - 1)]

DASHBOARD: Final = Path(__file__).with_name("dashboard.html")
"""The page: one file without any outside resource."""


def http_app(
    service: AggregatorService, ready: Ready, registry: CollectorRegistry, now_ms: Callable[[], int]
) -> FastAPI:
    """The application behind `ops_listen`.

    Args:
        service: read from, never changed.
        ready: the readiness check.
        registry: the metrics.
        now_ms: the aggregator's time, so that a page can count down to its deadlines.
    """
    app = ops_app(ready, registry)
    page = DASHBOARD.read_text(encoding="utf-8")
    headers = {**_COMMON_HEADERS, "Content-Security-Policy": content_policy(page)}

    @app.get("/", response_class=HTMLResponse)
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @app.get("/api/v1/federations")
    async def federations() -> JSONResponse:
        found = [federation_json(federation) for federation in await service.list_federations()]
        return _json({"federations": found, "now_ms": now_ms()})

    @app.get("/api/v1/federations/{name}")
    async def federation(name: str) -> JSONResponse:
        return _json({**federation_json(await service.get_federation(name)), "now_ms": now_ms()})

    @app.get("/api/v1/federations/{name}/agents")
    async def agents(name: str) -> JSONResponse:
        columns = await service.all_columns(name)
        return _json({"agents": [agent_json(agent, columns) for agent in await service.list_agents(name)]})

    @app.get("/api/v1/federations/{name}/rounds")
    async def rounds(name: str, after: _Number = 0, limit: _Number = 0) -> JSONResponse:
        columns = await service.all_columns(name)
        found = await service.list_rounds(name, after, limit)
        return _json({"rounds": [round_json(one, columns) for one in found]})

    @app.exception_handler(SheLoraError)
    async def refuse(_request: Request, error: Exception) -> JSONResponse:
        status = 404 if isinstance(error, NotFound) else 503
        code = error.code if isinstance(error, SheLoraError) else "internal_fault"
        return JSONResponse({"code": code, "message": str(error)}, status_code=status, headers=_COMMON_HEADERS)

    return app


def content_policy(page: str) -> str:
    """A Content-Security-Policy that allows exactly the page's own styles and script, and calls to its own origin."""
    sources: dict[str, list[str]] = {"script": [], "style": []}
    for kind, found in sources.items():
        for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, flags=re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            found.append(f"'sha256-{digest}'")
    parts = [f"{kind}-src {' '.join(found)}" for kind, found in sources.items()]
    return "; ".join(
        ["default-src 'none'", *parts, "connect-src 'self'", "base-uri 'none'", "form-action 'none'", _NO_FRAMES]
    )


_NO_FRAMES: Final = "frame-ancestors 'none'"
_COMMON_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _json(content: Json) -> JSONResponse:
    return JSONResponse(content, headers=_COMMON_HEADERS)
