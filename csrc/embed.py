"""Writes device sources into a C++ file, which defines what jit/sources.h declares.

python embed.py OUT.cc FILE...
"""

import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent


def literal(text: str) -> str:
    """A raw string: the source as it is, behind the first delimiter that does not occur in it."""
    delimiter = next(d for i in range(len(text)) if f'){(d := f"cuh{i}")}"' not in text)
    return f'R"{delimiter}({text}){delimiter}"'


def main(out: str, *files: str) -> None:
    sources = sorted(
        (path.relative_to(CSRC).as_posix(), path) for path in (Path(f).resolve() for f in files)
    )
    entries = "".join(
        f'      {{"{name}", {literal(path.read_text())}}},\n' for name, path in sources
    )
    Path(out).write_text(f"""\
#include "jit/sources.h"

namespace deepgemm::jit {{

const std::vector<std::pair<std::string, std::string>>& device_sources() {{
  static const auto& sources = *new std::vector<std::pair<std::string, std::string>>{{
{entries}  }};
  return sources;
}}

}}  // namespace deepgemm::jit
""")


if __name__ == "__main__":
    main(*sys.argv[1:])
