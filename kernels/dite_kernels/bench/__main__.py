"""`python -m dite_kernels.bench linear | codec`: JSON on stdout (or in --out), a table on stderr. Needs torch only."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from dite_kernels.bench import codec, linear
from dite_kernels.bench.cases import UnknownCase
from dite_kernels.bench.document import write

BENCHES = (linear, codec)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    chosen = parser.parse_args(words)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        document = chosen.bench.run(chosen, _tick)
    except UnknownCase as error:
        parser.error(str(error))  # exits with 2
    document = {"command": shlex.join(["python", "-m", "dite_kernels.bench", *words]), **document}
    print(chosen.bench.table(document), file=sys.stderr)
    if chosen.out:
        write(document, chosen.out)
    else:
        print(json.dumps(document, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dite_kernels.bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCH")
    for bench in BENCHES:
        command = commands.add_parser(bench.NAME, help=bench.HELP, description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        bench.add_options(command)
        command.add_argument("--rounds", type=_positive, help="exactly so many; otherwise as many as fit into --seconds")
        command.add_argument("--seconds", type=float, default=20.0, help="measured time for each shape or codec (default %(default)s)")
        command.add_argument("--threads", type=_positive, help="threads of torch on the CPU; as torch has it unless given")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default here: %(default)s)")
        command.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there and not to stdout")
        command.set_defaults(bench=bench)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _tick(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
