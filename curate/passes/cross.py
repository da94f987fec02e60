"""The public name of gradients/influence.py: every row's gradient against every target's."""

from curate.passes.gradients.influence import cross_products

__all__ = ["cross_products"]
