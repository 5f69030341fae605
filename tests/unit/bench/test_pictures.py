"""The pictures of `make bench` and `make profile`, and the regressions that a run reports."""

import re

from bench import picture
from bench.profile import count
from bench.regression import regressions
from bench.rounds import Comparison, Ratio

ROWS = {
    "accept": Comparison("orders", ratios={"floor": Ratio(0.5, 0.4, 0.6), "orm": Ratio(4.0, 3.0, 5.0)}),
    "idle": Comparison("per second", figures={"CPU %": Ratio(1.0, 1.0, 1.0)}),
}
SAMPLES = """\
main (app/main.py:1);run (uvloop/__init__.py:5);place (app/api/orders/place.py:9);fetch (asyncpg/connection.py:7) 3
main (app/main.py:1);run (uvloop/__init__.py:5);step (app/saga/runner.py:9) 2
main (app/main.py:1);run (uvloop/__init__.py:5) 1
write (threading.py:1);_write_all (app/observability/logs.py:9);_pause (app/observability/logs.py:7) 50
"""


def test_a_sample_belongs_to_the_innermost_part() -> None:
    """Code that asyncpg runs for a route is asyncpg's; waiting counts for none."""
    assert count(SAMPLES) == {"asyncpg": 3, "saga": 2, "event loop": 1}


def test_the_profile_shows_shares() -> None:
    """Each part has its share, the largest first."""
    texts = re.findall(r"<text[^>]*>([^<]*)", picture.of_profile({"accept": count(SAMPLES)}))
    assert texts[1:] == ["asyncpg", "50 %", "saga", "33 %", "event loop", "17 %"]


def test_bars_begin_at_one() -> None:
    """A contender that is faster has its bar to the left, a slower one to the right; rows without ratios have none."""
    bars = re.findall(r'<rect class="(\w+er)" x="([\d.]+)" y="\d+" width="([\d.]+)"', picture.of_ratios(ROWS))
    (slower, left, width), (faster, right, _) = bars
    assert (slower, faster) == ("slower", "faster")
    assert abs(float(left) + float(width) - float(right)) < 1


def test_only_a_clear_loss_is_a_regression() -> None:
    """A ratio below four fifths of the lowest one before is reported; a new row is not."""
    earlier = {"accept": {"ratios": {"floor": {"median": 0.9, "low": 0.8}, "orm": {"median": 4.5, "low": 4.2}}}}
    assert list(regressions(earlier, ROWS)) == ["accept ÷ floor: 0.50, before 0.90"]
