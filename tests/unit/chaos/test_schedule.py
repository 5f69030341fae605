"""The schedule of faults: reproducible, complete, and without two faults of one component at a time."""

from itertools import pairwise

from chaos.runner.faults import broker_nodes, kinds
from chaos.runner.schedule import WARM_UP_SECONDS, plan

LONG_SECONDS = 600.0


def test_one_seed_gives_one_schedule() -> None:
    """The same seed gives the same faults at the same times; another seed gives others."""
    assert plan(1, LONG_SECONDS, kinds()) == plan(1, LONG_SECONDS, kinds())
    assert plan(1, LONG_SECONDS, kinds()) != plan(2, LONG_SECONDS, kinds())


def test_every_kind_comes_before_any_comes_again() -> None:
    """A long run has all kinds, evenly often."""
    names = [injection.kind.name for injection in plan(3, LONG_SECONDS, kinds())]
    times = {kind.name: names.count(kind.name) for kind in kinds()}
    assert min(times.values()) >= 1
    assert max(times.values()) - min(times.values()) <= 1


def test_faults_of_one_component_do_not_overlap() -> None:
    """A component is hit again only after its last fault has ended; faults of different components do overlap."""
    injections = plan(4, LONG_SECONDS, kinds())
    assert injections[0].at_seconds == WARM_UP_SECONDS
    for component in {kind.component for kind in kinds()}:
        own = [injection for injection in injections if injection.kind.component == component]
        assert all(one.at_seconds + one.seconds < other.at_seconds for one, other in pairwise(own))
    assert any(one.at_seconds + one.seconds > other.at_seconds for one, other in pairwise(injections))


def test_faults_of_single_nodes_need_several() -> None:
    """A run with one node of the broker has none of them; a run with three has them all."""
    names = {kind.name for kind in kinds(3)} - {kind.name for kind in kinds()}
    assert names == set(broker_nodes.FAULTS)
