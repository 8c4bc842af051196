"""Ports for processes that start later."""

import random
import socket


def free_port() -> int:
    """A port that nobody listens on now, and that no system gives to a client meanwhile.

    Those that systems hand out by themselves begin at 32768; another program would take one of
    them in the seconds until it is used.
    """
    choice = random.SystemRandom()
    while True:
        port = choice.randrange(20_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
