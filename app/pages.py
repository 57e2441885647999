"""Lists as the SDK pages them: `?after=<last id>&limit=…`, answered with `has_more`. Keyset in SQL, never OFFSET."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field
from sqlalchemy import Select, orm


class HasId(Protocol):
    @property
    def id(self) -> Any: ...


T = TypeVar("T")
Row = TypeVar("Row", bound=HasId)
Order = Literal["asc", "desc"]
Limit = Annotated[int, Field(ge=0, le=100)]  # not FastAPI's: workers read pages too, and need no web framework


class Page(BaseModel, Generic[T]):
    """One page. `first_id` and `last_id` are null when it is empty."""

    object: Literal["list"] = "list"
    data: Sequence[T]
    has_more: bool
    first_id: str | None
    last_id: str | None


def fetch(
    session: orm.Session, query: Select[Row], column: Any, *, after: Any | None, limit: int, order: Order = "desc"
) -> tuple[Sequence[Row], bool]:
    """Rows of `query` behind the cursor and whether there are more, ordered by a column that follows time.

    Our ids do, so that an id which names nothing is a cursor as good as any.
    """
    if after is not None:
        query = query.where(column < after if order == "desc" else column > after)
    rows = session.scalars(query.order_by(column.desc() if order == "desc" else column.asc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def page(rows_and_more: tuple[Sequence[Row], bool], shown_as: Callable[[Row], T]) -> Page[T]:
    rows, has_more = rows_and_more
    first_id, last_id = (rows[0].id, rows[-1].id) if rows else (None, None)
    return Page(data=[shown_as(row) for row in rows], has_more=has_more, first_id=first_id, last_id=last_id)
