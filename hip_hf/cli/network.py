"""Errors of a missing network, told from all others."""

from __future__ import annotations

from collections.abc import Iterator

# By name: the hub's client uses one HTTP library or another.
UNREACHED = {
    *("ConnectionError", "ConnectError", "TimeoutError", "TimeoutException", "ConnectTimeout", "ReadTimeout", "ProxyError"),
    *("LocalEntryNotFoundError", "OfflineModeIsEnabled"),
}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def network_error(error: BaseException) -> str | None:
    """What could not be reached, if that is why this was raised."""
    for cause in causes(error):
        names = {kind.__name__ for kind in type(cause).__mro__}
        # Transformers reports it as a plain OSError, whose text is all there is to tell
        if names & UNREACHED or (isinstance(cause, OSError) and "couldn't connect to" in str(cause)):
            return (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return None
