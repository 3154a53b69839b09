"""liveweight: keep the weights that carry activity, and run what is left measurably faster."""

__version__ = "0.1.0"
