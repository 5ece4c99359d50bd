"""Tests of this folder share the launcher of real processes beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
