"""Tests of this folder share the small pipelines, servers and clients beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
