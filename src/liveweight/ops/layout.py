"""Names of memory layouts, as public functions take them, and their codes, as ops take them."""

from __future__ import annotations

from liveweight.reference.layouts import LAYOUTS


def layout_code(owner: str, name: str | None) -> int | None:
    """Return the code of a layout, None for None (like x); raise ValueError for other names."""
    if name is None:
        return None
    if not isinstance(name, str) or name not in LAYOUTS:
        wanted = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"{owner}: layout must be {wanted} or None, got {name!r}")
    return LAYOUTS[name]
