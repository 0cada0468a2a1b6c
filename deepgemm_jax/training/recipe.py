"""Which of a layer's products are in FP8."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The precision of a linear layer's three products, each "fp8" or "bf16".

    "fp8" quantises both operands along the dim that is contracted: activations and gradients with a
    scale for each 128 of a row, weights with one for each 128 × 128, and for `wgrad` both operands
    with one for each 128 tokens of a channel.

    Attributes:
      forward: of x w.
      dgrad: of dy wᵀ, the gradient of x.
      wgrad: of xᵀ dy, the gradient of w. What is kept of x for it is kept in this precision.
    """

    forward: str = "fp8"
    dgrad: str = "fp8"
    wgrad: str = "fp8"

    def __post_init__(self):
        for product, precision in dataclasses.asdict(self).items():
            if precision not in ("fp8", "bf16"):
                raise ValueError(f"Recipe: {product} is {precision!r}, wanted 'fp8' or 'bf16'")

    @classmethod
    def of(cls, name: str, recipe: Any) -> "Recipe":
        """The recipe that an op of this name was given: one, or the precision of all products."""
        if isinstance(recipe, cls):
            return recipe
        if recipe in ("fp8", "bf16"):
            return cls(recipe, recipe, recipe)
        raise ValueError(f"{name}: recipe is {recipe!r}, wanted a Recipe, 'fp8' or 'bf16'")
