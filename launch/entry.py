"""Where does `distca` begin? Listening: the imports of a command take seconds, in which it may be asked to stop."""

import os
import sys

from distca.errors import EXIT_TRY_AGAIN
from distca.launch.process import stop


def main() -> None:
    stop.listen()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or PyTorch tells, per socket, that hosts have no names
    from distca.launch.cli import run

    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # in the moment before the command listens, or the one after
        os.write(2, b"distca: stopped, as asked\n")
        sys.exit(EXIT_TRY_AGAIN)


if __name__ == "__main__":
    main()
