"""``python -m lora2serve``."""

import sys

# Python puts the current folder first. It may be a download: nothing is imported from there, unless we lie there.
if not sys.flags.safe_path and not __file__.startswith(f"{sys.path[0]}/lora2serve/"):
    del sys.path[0]

from lora2serve.cli import main

main()
