"""What XLA made of a program."""

import re


def collectives(compiled) -> set[str]:
    """The kinds of them in a compiled program."""
    names = "all-gather|all-reduce|(?:ragged-)?all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text()))
