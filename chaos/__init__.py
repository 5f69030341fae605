"""The proof that the promises hold: faults are injected into everything, and what is left is judged.

`proxy` injects faults between the service and a server; `runner` loads the whole system under a schedule of faults;
`sweep` kills the service at every point of an order's way; `bugs` plants known bugs and checks that tests catch them.
"""
