"""The way of an event: outbox, relay, broker, consumer, dead letters."""

from scripts.dashboards.model import Dashboard, Panel, Query
from scripts.dashboards.shared_panels import OLDEST_EVENT, UNSTARTED

OUTBOX = Dashboard(
    "outbox",
    "outbox and broker",
    "Do events reach the broker, and do consumers handle them?",
    [
        Panel(
            "How many events wait in the outbox?",
            "Rows neither published nor parked. Every process reads the same number from Postgres.",
            "short",
            [Query("max(outbox_pending)", "pending")],
            limit=100,
            alert="OutboxBacklog",
        ),
        OLDEST_EVENT,
        Panel(
            "How many events are published?",
            "Confirmed by the broker. If this is 0 while rows wait, the alert OutboxNotPublishing fires.",
            "ops",
            [Query("sum(rate(outbox_published_total[$__rate_interval]))", "published")],
        ),
        Panel(
            "Why are events not published at once?",
            "Failed: refused, or in a batch that failed with the broker. Returned: no queue took it. Sent again: the"
            " order had not started.",
            "ops",
            [
                Query("sum(rate(outbox_publish_failed_total[$__rate_interval]))", "failed"),
                Query("sum(rate(outbox_returned_total[$__rate_interval]))", "returned"),
                Query("sum(rate(outbox_resent_total[$__rate_interval]))", "sent again"),
            ],
        ),
        Panel(
            "Has the broker refused an event for good?",
            "Parked rows wait for `orders outbox requeue`; later events of the same orders wait behind them.",
            "short",
            [Query("max(outbox_parked)", "parked")],
            limit=1,
            alert="OutboxParked",
            kind="stat",
        ),
        Panel(
            "Are there dead letters?",
            "Messages that could not be handled, and wait for `orders dlq replay`. Their orders have not started.",
            "short",
            [Query("max(dlq_depth)", "dead letters")],
            limit=1,
            alert="DeadLetters",
            kind="stat",
        ),
        Panel(
            "How many messages wait for a consumer?",
            "By queue. Rises if consumers are too slow, or if there are none.",
            "short",
            [Query("max by (queue) (queue_depth)", "{{queue}}")],
            limit=1000,
            alert="QueueBacklog",
        ),
        Panel(
            "What becomes of deliveries?",
            "Processed: took effect. Duplicate: had done so before, and was skipped. Failed: will be delivered again.",
            "ops",
            [
                Query("sum(rate(consumer_processed_total[$__rate_interval]))", "processed"),
                Query("sum(rate(consumer_dedup_hits_total[$__rate_interval]))", "duplicate"),
                Query("sum(rate(consumer_failed_total[$__rate_interval]))", "failed"),
                Query("sum(rate(dlq_messages_total[$__rate_interval]))", "dead-lettered"),
            ],
        ),
        Panel(
            "Does a relay work?",
            "Time since a relay of any process last worked without an error, also if that process has ended.",
            "s",
            [Query('time() - max(max_over_time(loop_last_success_timestamp_seconds{loop="relay"}[1h]))', "relay")],
            limit=60,
            alert="RelayDown",
        ),
        Panel(
            "Does a consumer work?",
            "Time since any process last received from the broker, and last looked for due sagas.",
            "s",
            [
                Query(
                    "time() - max by (loop)"
                    ' (max_over_time(loop_last_success_timestamp_seconds{loop=~"consumer|orchestrator"}[1h]))',
                    "{{loop}}",
                )
            ],
            limit=60,
            alert="ConsumerDown",
        ),
        UNSTARTED,
    ],
)
