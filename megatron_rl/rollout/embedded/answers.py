"""Turns results of routes into JSON answers and their errors into HTTP statuses, and awaits other threads' futures."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from megatron_rl.rollout.embedded.engine import EngineStopped
from megatron_rl.rollout.embedded.fields import RequestError
from megatron_rl.rollout.embedded.updates import UpdateError


def errors_as_json(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RequestError as error:
            return json_answer(error_body(str(error)), error.status)
        except UpdateError as error:
            return json_answer({"success": False, "message": str(error)}, 400)
        except EngineStopped as error:
            return json_answer(error_body(str(error)), 500)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    return guarded


async def wait(future: "Future[Any]") -> Any:
    return await asyncio.wrap_future(future)


def json_answer(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")


def error_body(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def success(message: str, **more: Any) -> Response:
    return json_answer({"success": True, "message": message, **more})
