"""The planning half of dite.parallel is plain Python: importable where torch is not."""

import subprocess
import sys
from pathlib import Path


def test_planning_needs_no_torch():
    modules = ", ".join(f"dite.parallel.{name}" for name in ("budget", "choice", "controller", "cost", "schedule"))
    code = f"import sys\nfor name in ('torch', 'numpy', 'diffusers'): sys.modules[name] = None\nimport {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
