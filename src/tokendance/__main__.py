"""The command `tokendance`, and `python -m tokendance`."""

from tokendance.interrupts import importing


def main() -> None:
    """Run the command line."""
    with importing():
        from tokendance.cli import main as run
    run()


if __name__ == "__main__":
    main()
