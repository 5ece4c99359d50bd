"""Nothing heavy is loaded before it is needed: help must be quick, and the server's HTTP process must hold no GPU context."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL")


def loaded_after(code: str, root) -> set[str]:
    """Which heavy modules a fresh interpreter holds after running `code`."""
    report = f"import sys\n{code}\nprint('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("loaded:", 1)[1].split())


def test_import_dite_loads_nothing_heavy(root):
    assert loaded_after("import dite", root) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["generate", "--help"],
        ["eval", "--help"],
        ["bench", "--help"],
        ["bench", "linear", "--shapes", "4x4"],
        ["bench", "codec", "--codecs", "int3"],
        ["recipes"],
        ["serve", "--help"],
        ["serve", "builtin:cifar10-dit", "--dry-run"],
        ["quantize", "m", "-o", "x", "--recipe", "w4a9"],
    ],
)
def test_a_command_that_runs_no_model_loads_nothing_heavy(root, arguments):
    assert loaded_after(f"from dite.cli import main\nmain({arguments})", root) == set()


def test_the_servers_http_process_loads_nothing_heavy(root):
    code = "from dite.server.app import create_app\nfrom dite.server.service import Service\nfrom dite.server.settings import ServerSettings\n"
    assert loaded_after(f"{code}import dite.server.listen\ncreate_app(Service(ServerSettings(model='m')))", root) == set()


def test_the_library_works_where_triton_is_absent(root):
    code = "sys.modules['triton'] = None\nimport dite_kernels.backends\nassert dite_kernels.backends.describe()"
    path = f"sys.path[:0] = [{str(root / 'kernels')!r}]\n"
    assert "torch" in loaded_after(path + code, root)
