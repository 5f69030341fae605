"""The pages in the navigation, in its order, and the files and templates of all pages."""

from app.pages.assets import Assets
from app.pages.templates import Templates
from app.values import immutable


@immutable
class Link:
    """A page in the navigation. `for_operators`: others do not see it."""

    name: str
    href: str
    for_operators: bool = True


LINKS = (
    Link("Overview", "/console"),
    Link("Orders", "/console/orders", for_operators=False),
    Link("Dead letters", "/console/dead-letters"),
    Link("Outbox", "/console/outbox"),
    Link("Partners", "/console/partners"),
    Link("Audit", "/console/audit"),
)

assets = Assets("/console/files", ["app.pages", "app.console"])
templates = Templates("app.console", assets, links=LINKS)
