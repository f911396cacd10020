"""``python -m lora2serve``."""

from lora2serve.cli import main

main()
