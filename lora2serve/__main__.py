"""The command: ``lora2serve``, or ``python -m lora2serve``."""

import sys


def start() -> None:
    """Run the command line of this process, and end it."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load nothing is to be tidied up
    from lora2serve.cli import main

    main()


if __name__ == "__main__":
    # Python puts the current folder first. It may be a download: nothing is imported from there, unless we lie there.
    if not sys.flags.safe_path and not __file__.startswith(f"{sys.path[0]}/lora2serve/"):
        del sys.path[0]
    start()
