"""`python -m peftplan`."""

from peftplan.cli import run

if __name__ == "__main__":
    run()
