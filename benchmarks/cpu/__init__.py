"""The CPU benchmark suite: tables of paired measurements, a page and plots. See __main__.py."""
