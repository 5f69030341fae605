"""The playground of the demo: a page whose buttons break the system, and which shows beside them how it recovers.

The supervisor serves it, on a port of its own, so it survives everything that it breaks. Each part of the page is read
by itself and in a bounded time: what is down is shown as such, and never stops the rest.

    access      only a browser that opened the address with the token may look and break
    app         the page, its stream, and the form of all buttons
    actions     what each button does                                              (customers, partners)
    state       what the page shows                                                 (invariants, events)
"""
