"""The Ray cluster on which trials and trainings run."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Mapping

from lora2serve.errors import Lora2ServeError, first_line
from lora2serve.system import interruption
from lora2serve.system.extras import install_hint

WAIT = 30.0  # seconds for it to answer
ADDRESS = "RAY_ADDRESS"  # of the cluster; by default that which runs on this machine


def connect(kind: type[Lora2ServeError], address: str | None = None) -> Mapping[str, float]:
    """What the cluster at ``address``, at RAY_ADDRESS or on this machine has, such as GPU and CPU.

    Raises ``kind`` where there is none.
    """
    try:
        import ray
    except ImportError:
        raise kind("ray is not installed", install_hint("ray")) from None
    address = address or os.environ.get(ADDRESS) or "auto"
    if not ray.is_initialized():
        handlers = {number: signal.getsignal(number) for number in interruption.ENDINGS}
        try:
            _ask_whether_it_is_there(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            hint = f"`ray start --head` starts one here; {ADDRESS} names another"
            raise kind(f"no Ray cluster ({first_line(error)})", hint) from None
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # of which Ray takes some
                signal.signal(number, handler)
    resources: Mapping[str, float] = ray.cluster_resources()
    return resources


def _ask_whether_it_is_there(address: str) -> None:
    """OSError where nobody listens: Ray itself would go on asking for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), WAIT).close()


def cause(error: BaseException) -> str:
    """What a job raised on its node, without Ray's words around it."""
    return first_line(getattr(error, "cause", None) or error)
