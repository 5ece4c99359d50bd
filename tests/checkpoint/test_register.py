"""diffusers knows dite, whichever of the two is imported first."""

import subprocess
import sys

import pytest

CHECK = "from diffusers.quantizers import auto; assert auto.AUTO_QUANTIZER_MAPPING['dite'] and auto.AUTO_QUANTIZATION_CONFIG_MAPPING['dite']"


@pytest.mark.parametrize(
    "first",
    ["import dite; import diffusers", "import diffusers; import dite", "import diffusers.quantizers; import dite", "import dite.ptq.quantize"],
)
def test_diffusers_knows_dite_in_any_order_of_imports(first):
    done = subprocess.run([sys.executable, "-c", f"{first}; {CHECK}"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_dite_alone_imports_neither_torch_nor_diffusers():
    code = "import dite, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
