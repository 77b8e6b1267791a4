"""Open files: how many this process may have, and for how many connections they are enough."""

import logging
import sys

log = logging.getLogger("tokendance.server.handles")

# Handles that connections leave to files, and to those that are accepted before others are closed:
# asyncio accepts some in each turn of its loop, and closing one takes three turns.
_RESERVED_HANDLES = 256


def raise_handle_limit() -> None:
    """Let this process open as many files as the system lets it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # macOS has no limit by name, and one in the kernel
        log.debug("the limit of open files cannot be raised", exc_info=True)


def handles_for_connections() -> int:
    """Connections for which there are handles."""
    try:
        import resource
    except ImportError:
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(limit - _RESERVED_HANDLES, limit // 2)
