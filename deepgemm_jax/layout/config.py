"""The variants of the transposing kernel."""

import dataclasses

SOURCE = "layout/sm90_transpose.cuh"


@dataclasses.dataclass(frozen=True)
class Config:
    """One variant: see ``csrc/layout/config.h``."""

    element_bytes: int


def variants() -> list[Config]:
    return [Config(size) for size in (1, 2, 4)]
