"""I5 and I7 hold and every saga ends, whenever runners die or freeze, and whatever is lost, repeated or late."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from app.orders.model import Reason, Status
from app.partners.ports import NotSent, Unknown
from app.saga.plan import Call, SagaDirection
from app.saga.steps import Step
from tests.harness.saga_model import STOCK, Partners, Rows, Runner, Standing

ROUNDS = 20  # far more calls than any saga needs if every call succeeds
FRESH = 20  # seconds that a saga may go forward
SHORT = 5
HOLDS = st.sampled_from([FRESH + 10, SHORT])  # as configured, and shorter than it ever should be

ORDERS = 2  # few, so that many events happen to each
orders = st.integers(0, ORDERS - 1)
mostly = st.sampled_from([True] * 7 + [False])
rarely = mostly.map(lambda often: not often)
standings = st.builds(Standing, st.integers(1, STOCK), HOLDS, mostly, mostly)
Post = tuple[int, Call]


class Sagas(RuleBasedStateMachine):
    """Orders for one scarce item, the runners of their sagas, and the requests in transit."""

    runners: Bundle[Runner] = Bundle("runners")
    requests: Bundle[Post] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.partners = Partners()
        self.rows = [Rows(deadline_at=FRESH) for _ in range(ORDERS)]
        self.on_their_way: set[Post] = set()
        self.accepted: set[int] = set()
        self.final: dict[int, Status] = {}

    @initialize(target=runners, standings=st.tuples(*[standings] * ORDERS))
    def start(self, standings: tuple[Standing, ...]) -> Runner:
        self.partners.sagas = dict(enumerate(standings))
        return multiple(*map(self.take_on, range(ORDERS)))  # type: ignore[return-value] # they are added one by one

    @rule(target=runners, number=orders)
    def take_on(self, number: int) -> Runner:
        """Claim the saga, possibly from a runner that still runs it and whose call is in transit."""
        if self.rows[number].ended:
            return multiple()  # type: ignore[return-value] # nothing is added to the bundle
        runner = Runner(self.rows[number], number)
        runner.begin(self.partners.now)
        return runner

    @rule(target=requests, runner=runners)
    def send(self, runner: Runner) -> Post:
        """Send the request; its answer may or may not be used."""
        if runner.asks is None:
            return multiple()  # type: ignore[return-value] # nothing is added to the bundle
        self.on_their_way.add((runner.number, runner.asks))
        return (runner.number, runner.asks)

    @rule(request=requests)
    def deliver(self, request: Post) -> None:
        """Deliver the request, for the first time or again; no runner waits for the answer."""
        self.partners.deliver(*request)

    @rule(runner=runners, calls=st.integers(1, len(Step)), meanwhile=st.sampled_from([None, None, "cancel", "time"]))
    def call(self, runner: Runner, calls: int, meanwhile: str | None) -> None:
        """Make so many calls whose answers arrive. Something may happen during the last one."""
        for left in reversed(range(calls)):
            if runner.asks is not None:
                outcome = self.partners.deliver(runner.number, runner.asks)
                if not left and meanwhile == "cancel":
                    self.cancel(runner.number, really=True)
                if not left and meanwhile == "time":
                    self.pass_time(SHORT)
                runner.hear(outcome, self.partners.now)

    @rule(runner=runners, arrives=st.booleans())
    def lose(self, runner: Runner, *, arrives: bool) -> None:
        """Lose the request or its answer; the runner records an unknown outcome."""
        if runner.asks is not None:
            if arrives:
                self.partners.deliver(runner.number, runner.asks)
            runner.hear(Unknown("no answer"), self.partners.now)

    @rule(runner=runners)
    def reach_nobody(self, runner: Runner) -> None:
        if runner.asks is not None:
            runner.hear(NotSent("nobody there"), self.partners.now)

    @rule(runner=consumes(runners), arrives=st.booleans())
    def die(self, runner: Runner, *, arrives: bool) -> None:
        """Kill the runner: its attempt is recorded, the call was made or not, and its outcome is lost."""
        if runner.asks is not None and arrives:
            self.partners.deliver(runner.number, runner.asks)

    @rule(number=orders, really=rarely)
    def cancel(self, number: int, *, really: bool) -> None:
        if really and self.rows[number].cancel():
            self.accepted.add(number)

    @rule(seconds=st.sampled_from([0, 0, 0, 1, 1, SHORT, FRESH]))
    def pass_time(self, seconds: int) -> None:
        self.partners.pass_time(seconds)

    @invariant()
    def stock_is_conserved(self) -> None:
        assert self.partners.holding("held") + self.partners.holding("sold") <= STOCK

    @invariant()
    def there_are_never_two_live_charges(self) -> None:
        assert all(0 <= saga.charges - saga.refunds <= saga.charges <= 1 for saga in self.partners.sagas.values())

    @invariant()
    def what_has_ended_stays_as_it_ended_and_the_partners_agree(self) -> None:
        for number, rows in enumerate(self.rows):
            assert self.final.setdefault(number, rows.status) is rows.status or not rows.ended
            if not rows.ended:
                del self.final[number]
                continue
            saga = self.partners.sagas[number]
            stands = (saga.charges - saga.refunds, saga.parcels, saga.hold in {"held", "sold"})
            confirmed = rows.status is Status.CONFIRMED
            assert stands == ((1, 1, True) if confirmed else (0, 0, False)), f"{rows.status}, but {saga}"
            assert saga.hold != "held"

    @invariant()
    def an_accepted_cancel_is_kept_and_nobody_elses_order_is_cancelled(self) -> None:
        for number, rows in enumerate(self.rows):
            assert not (number in self.accepted and rows.status is Status.CONFIRMED)
            assert rows.status is not Status.CANCELLED or number in self.accepted
            by_customer = rows.state.reason is Reason.CANCELLED_BY_CUSTOMER
            if rows.ended:
                assert (rows.status is Status.CANCELLED) == by_customer

    @invariant()
    def the_order_shows_which_way_its_saga_goes(self) -> None:
        for rows in self.rows:
            if not rows.ended:
                forward = rows.state.direction is SagaDirection.FORWARD
                assert rows.status is (Status.PENDING if forward else Status.COMPENSATING)

    def teardown(self) -> None:
        """Let every call succeed: every saga ends, and requests that arrive later change nothing."""
        for number, rows in enumerate(self.rows):
            runner = None if rows.ended else Runner(rows, number)
            if runner is not None:
                runner.begin(self.partners.now)
                self.call(runner, ROUNDS, meanwhile=None)
            assert rows.ended, f"has not ended: {rows}"
        for request in sorted(self.on_their_way, key=str):
            self.partners.deliver(*request)
        self.partners.pass_time(10 * FRESH)
        self.check_invariants_again()

    def check_invariants_again(self) -> None:
        self.stock_is_conserved()
        self.there_are_never_two_live_charges()
        self.what_has_ended_stays_as_it_ended_and_the_partners_agree()
        self.an_accepted_cancel_is_kept_and_nobody_elses_order_is_cancelled()


TestSagas = Sagas.TestCase
TestSagas.settings = settings(max_examples=600, stateful_step_count=40)
