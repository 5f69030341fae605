"""The web console for operators: what is wrong first, the story of one order, and every action with its reason.

It shows the reading models of `operations`, which the commands and `/ops` show too, and it calls the same actions. Each
page is a module with its routes, and a template; `pages` says how pages stay live and how forms are checked.

    login       a token → a session cookie          (sessions)
    route       who may see a page; errors as pages
    links       the pages in the navigation, in its order
    order       the page of one order: its story as a picture, and what followed an operator's action (story, follow_up)
"""
