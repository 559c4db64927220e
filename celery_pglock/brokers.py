"""How long a broker waits for a message to be acknowledged."""

from __future__ import annotations

from typing import Any

# How long kombu's transports keep a message from other workers, where nothing else is set: after that
# they deliver it again.
VISIBILITY_TIMEOUTS = {"redis": 3600.0, "sqs": 1800.0}


def visibility_timeout(app: Any) -> float | None:
    """Seconds after which the app's broker delivers a message again; ``None`` if it never does."""
    with app.connection_for_write() as connection:
        # The class tells without a connection, and without the transport's client library.
        default = VISIBILITY_TIMEOUTS.get(connection.get_transport_cls().driver_type)
    if default is None:
        return None
    return float((app.conf.broker_transport_options or {}).get("visibility_timeout") or default)
