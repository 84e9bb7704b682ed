"""Which column of an items table to show to people."""

from __future__ import annotations

import polars as pl

_NAMES = (
    "title",
    "name",
    "item_title",
    "item_name",
    "product_title",
    "product_name",
    "headline",
    "original_title",
)


def title_column(items: pl.DataFrame | None) -> str | None:
    """The text column that names an item: `title`, else `name` and the like (any case), else None.

    A text column that merely describes (a category, a brand, a long description) is never taken for a title.
    """
    if items is None:
        return None
    text = {c.lower(): c for c, dtype in items.schema.items() if dtype in (pl.String, pl.Categorical)}
    return next((text[name] for name in _NAMES if name in text), None)
