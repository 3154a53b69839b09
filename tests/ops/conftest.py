"""Lets tests import the helper modules of this folder: test folders are not packages."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
