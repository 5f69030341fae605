"""The dependencies of the console's routes."""

from app.api.health import SharedCall
from app.console.sessions import Sessions
from app.operations.overview import OverviewAnswer
from app.pages.feed import Feed
from app.values import immutable


@immutable
class ConsoleConfig:
    """How the console of the demo differs. `open_key`: signs the sessions that every visitor gets; empty: log in.

    `playground_url`: where the demo's playground is; empty: there is none.
    """

    open_key: str = ""
    playground_url: str = ""


@immutable
class ConsoleDeps:
    """What the console needs besides what operations need. `playground_url`: as in `ConsoleConfig`.

    `overview`: reads once for all who look on.
    """

    sessions: Sessions
    feed: Feed
    playground_url: str
    overview: SharedCall[OverviewAnswer]
