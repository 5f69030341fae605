"""The floor of accepting an order: FastAPI validates it with Pydantic and answers 201. Nothing is stored."""

import os
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated
from uuid import UUID, uuid4

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field


class Item(BaseModel):
    """One line of an order."""

    sku: Annotated[str, Field(min_length=1, max_length=50)]
    quantity: Annotated[int, Field(ge=1)]
    unit_price: Annotated[Decimal, Field(ge=0)]


class NewOrder(BaseModel):
    """The body of the request."""

    items: Annotated[list[Item], Field(min_length=1, max_length=100)]
    currency: str = "USD"


class Order(NewOrder):
    """The body of the answer."""

    id: UUID
    status: str
    total: Decimal
    placed_at: datetime


app = FastAPI()


@app.post("/orders", status_code=201)
async def place(order: NewOrder) -> Order:
    """Answer as if the order was stored."""
    total = sum((item.quantity * item.unit_price for item in order.items), Decimal())
    return Order(**order.model_dump(), id=uuid4(), status="pending", total=total, placed_at=datetime.now(UTC))


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning", timeout_keep_alive=75)
