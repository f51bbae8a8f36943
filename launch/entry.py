"""Where does `distca` begin? Listening: the imports of a command take seconds, in which it may be asked to stop."""

import os
import sys

from distca.launch import stop


def main() -> None:
    stop.listen()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or PyTorch tells, per socket, that hosts have no names
    from distca.launch.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
