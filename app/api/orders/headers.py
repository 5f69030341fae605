"""Parse the request headers `If-None-Match` and `Prefer`. Pure."""

import re
from collections.abc import Sequence

ETAG = r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*+")'  # RFC 9110, section 8.8.3; it may contain commas
ETAGS = re.compile(rf"[ \t,]*+(?:{ETAG}[ \t]*+(?:,[ \t,]*+|\Z))+")
NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
QUOTED = r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'  # without a closing quote it takes the rest: linear time for any input
MEMBER = re.compile(rf'(?:{QUOTED}|[^",])++')
PREFERENCE = re.compile(rf"[ \t]*+({NAME})(?:[ \t]*+=[ \t]*+({NAME}|{QUOTED}))?[ \t]*+(?:;|\Z)")
DELTA_SECONDS = re.compile(r"[0-9]{1,20}")


def none_match_fails(values: Sequence[str], etag: str) -> bool:
    """Return whether `If-None-Match` names this strong ETag, so that the answer to a GET is 304.

    Weak comparison; `*` matches any ETag (RFC 9110, section 13.1.2). A value that is not a list of entity tags is
    ignored: a full answer is always correct.
    """
    value = ",".join(values).strip(" \t")
    if value == "*":
        return True
    return ETAGS.fullmatch(value) is not None and etag in re.findall(ETAG, value)


def preferred_wait(values: Sequence[str]) -> int | None:
    """Return the seconds of `Prefer: wait=N` (RFC 7240, section 4.3), or None without a valid one.

    The first `wait` counts. Other preferences, parameters and malformed parts are ignored, as section 2 requires of a
    server that does not know them.
    """
    for member in MEMBER.findall(",".join(values)):
        match = PREFERENCE.match(member)
        if match is not None and match[1].lower() == "wait":
            return int(match[2]) if match[2] and DELTA_SECONDS.fullmatch(match[2]) else None
    return None
