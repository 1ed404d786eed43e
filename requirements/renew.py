"""Write the versions that are installed in this environment into a list of pins: `python requirements/renew.py cpu`.

To renew: install newer versions into a scratch environment, run the tests there, then this from there. Only names that
the list has already are rewritten; what the list names and the environment lacks is an error, and nothing is written.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(.*)$")


def renewed(text: str) -> str:
    """The list with the installed versions. Raises PackageNotFoundError."""
    return "".join(_line(line) for line in text.splitlines(keepends=True))


def _line(line: str) -> str:
    found = PIN.match(line.rstrip("\n"))
    if found is None:
        return line
    name, _, rest = found.groups()
    return f"{name}=={version(name)}{rest}\n"


def main(arguments: list[str]) -> None:
    file = Path(__file__).parent / f"{arguments[0] if arguments else 'cpu'}.txt"
    before = file.read_text()
    try:
        after = renewed(before)
    except PackageNotFoundError as missing:
        sys.exit(f"{file.name} pins {missing.name}, which is not installed here: install it, or take its line out.")
    file.write_text(after)
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    print("\n".join(changed) or f"{file.name} names what is installed already.")


if __name__ == "__main__":
    main(sys.argv[1:])
