"""``python -m flowverify`` is the command line."""

from flowverify.cli import main

if __name__ == "__main__":
    main()
