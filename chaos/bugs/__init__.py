"""Plant known bugs, one at a time, in a scratch copy, and check that a test catches each: `python -m chaos.bugs`.

A harness that never fails proves nothing. Each bug breaks one invariant in the way that services of this kind commonly
do. A bug whose text no longer occurs exactly once in the code fails the run, so the tables cannot go stale.

Map: `acknowledging`, `messaging`, `driving` and `gathering` (the bugs) → `planting` (a bug in a copy) → `trying` (does
a judge see it: a test, or a run of `chaos.runner`).
"""

from chaos.bugs import acknowledging, driving, gathering, messaging
from chaos.bugs.planting import Bug
from chaos.bugs.trying import Catch

BUGS: tuple[Bug, ...] = (*acknowledging.BUGS, *messaging.BUGS, *driving.BUGS, *gathering.BUGS)

__all__ = ["BUGS", "Bug", "Catch"]
