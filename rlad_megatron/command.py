"""What `rlad` and `rlad-nemo` share."""

from __future__ import annotations

import argparse
import contextlib
from typing import NoReturn

from rlad_megatron.errors import USER_ERROR


class CommandParser(argparse.ArgumentParser):
    """Prints its errors as one line, like every other error the user can fix."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"rlad: {message}; `{self.prog} --help` describes it\n")


def print_out(text: str) -> None:
    """Print a command's result. A closed pipe, as in `rlad show RECIPE | head -1`, is not an error."""
    with contextlib.suppress(BrokenPipeError):
        print(text, end="", flush=True)
