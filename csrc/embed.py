"""Writes device sources into a C++ file that defines what jit/sources.h declares.

python embed.py OUT.cc FILE...
"""

import itertools
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent

FILE = """\
#include "jit/sources.h"

namespace deepgemm::jit {{

const std::vector<std::pair<std::string, std::string>>& device_sources() {{
  // Never destroyed: XLA's threads may outlive static objects.
  static const auto& sources = *new std::vector<std::pair<std::string, std::string>>{{
{entries}
  }};
  return sources;
}}

}}  // namespace deepgemm::jit
"""


def literal(text: str) -> str:
    """A raw string, with the first delimiter that does not end it too early."""
    delimiters = (f"cuh{i}" for i in itertools.count())
    delimiter = next(d for d in delimiters if f'){d}"' not in text)
    return f'R"{delimiter}({text}){delimiter}"'


def main(out: str, *files: str) -> None:
    names = sorted(Path(file).resolve().relative_to(CSRC).as_posix() for file in files)
    sources = {name: (CSRC / name).read_text(encoding="utf-8") for name in names}
    entries = (f'      {{"{name}", {literal(text)}}},' for name, text in sources.items())
    Path(out).write_text(FILE.format(entries="\n".join(entries)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
