"""asgi-idempotency-header with its Redis backend, in front of the floor that stores nothing."""

import os

import uvicorn
from idempotency_header_middleware import IdempotencyHeaderMiddleware
from idempotency_header_middleware.backends import RedisBackend
from redis.asyncio import Redis

from bench.floors.fastapi_only import app

if __name__ == "__main__":
    app.add_middleware(IdempotencyHeaderMiddleware, backend=RedisBackend(Redis.from_url(os.environ["REDIS_URL"])))
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning", timeout_keep_alive=75)
