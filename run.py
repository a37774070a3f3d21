"""``python run.py ...`` is the ``certprune`` command, for a checkout that is not installed."""

from certprune.cli import main

if __name__ == "__main__":
    main()
