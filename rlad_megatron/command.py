"""What the commands `rlad` and `rlad-nemo` share."""

from __future__ import annotations

import argparse
import contextlib
from typing import NoReturn

from rlad_megatron.errors import USER_ERROR


class CommandParser(argparse.ArgumentParser):
    """Its errors are one line, as all others that a user can mend."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"rlad: {message}; `{self.prog} --help` says what it takes\n")


def print_out(text: str) -> None:
    """Print a command's result. A reader that has left, as in `rlad show RECIPE | head -1`, is no error."""
    with contextlib.suppress(BrokenPipeError):
        print(text, end="", flush=True)
