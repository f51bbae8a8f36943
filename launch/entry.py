"""Where does `distca` begin? Listening: the imports of a command take seconds, in which it may be asked to stop."""

import sys

from distca.launch import stop


def main() -> None:
    stop.listen()
    from distca.launch.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
