"""Exemplars: the trace behind a sample of a histogram, so that a dashboard can lead from a slow call to its trace."""

from opentelemetry import trace


def current_exemplar() -> dict[str, str] | None:
    """Return the ids of the current span as an exemplar; None unless the span is one of ours that is exported.

    The context of a caller is not enough: the caller may sample a trace to which this process adds nothing.
    """
    context = trace.get_current_span().get_span_context()
    if not context.is_valid or context.is_remote or not context.trace_flags.sampled:
        return None
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}
