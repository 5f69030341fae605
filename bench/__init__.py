"""Measure the service beside other ways to do the same job, and report ratios.

The machine is shared and noisy, so no absolute figure is worth much. Each row runs its contenders in turns (A B A B) on
the same servers, with the same load generator and the same durability, and compares them within each round. What is
reported is the median of these ratios, and their spread. `docs/performance.md` describes the rows.

    lab.py        the private servers, and the programs that a row starts
    client.py     the load generator
    measure.py    one window of load: rate, latency, processor time, statements
    rounds.py     the windows of all contenders in turns, and the ratios
    rows/         one function per row of the table
    floors/       what the service is compared with: small programs, to be read beside it
    partners.py   the partners of every contender: constant answers, as fast as Python gives them
    peers/        libraries that do a part of the job, in environments of their own
    report.py     the figures as text; regression.py compares them with those of an earlier run

It imports nothing of the service: it starts it as a process.
"""
