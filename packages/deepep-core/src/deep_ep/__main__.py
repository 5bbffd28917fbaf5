"""``python -m deep_ep`` is ``deepep``."""

from .cli import main

if __name__ == "__main__":
    main()
