"""What the framework costs beside the published algorithms as their authors run them, and beside the arithmetic itself.

    python benchmarks/bench.py [parts=craft,step] [model=resnet18,wrn34_10 batch=32,4] [pairs=5] [to=results.json]

All keys: ``benchmarks/options.py``; how to read the results: ``benchmarks/README.md``.
"""

from __future__ import annotations

import datetime
import pkgutil
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks import write
from benchmarks.machine import DTYPES, Shape, convolutions, describe, product, squares
from benchmarks.measure import Section, seconds_on
from benchmarks.options import Options, read
from benchmarks.ours import CELLS

from redoubt.errors import UserError
from redoubt.training.trainer import quiet_lightning

#: Imported when they are asked for: child processes of ``scaling`` import this file too.
PARTS = {
    "craft": "benchmarks.training:craft",
    "step": "benchmarks.training:step",
    "libraries": "benchmarks.training:libraries",
    "data": "benchmarks.loading:data",
    "suite": "benchmarks.suites:suites",
    "start": "benchmarks.starting:start",
    "memory": "benchmarks.training:memory",
    "scaling": "benchmarks.scaling:scaling",
    "profile": "benchmarks.profiling:profiled",
}


def main(words: Sequence[str]) -> list[Section]:
    """Measures the chosen parts, shows and writes them."""
    o = read(words, CELLS)
    torch.set_num_threads(o.threads)
    quiet_lightning()
    warnings.filterwarnings("ignore", category=UserWarning)
    results = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/bench.py", *words]),
        "machine": describe(o.device),
        "matrix_rate": {p: rate(o, p, convolutions(o.batch)) for p in o.precisions},
        "square_rate": {p: rate(o, p, squares(o.device)) for p in o.precisions},
    }
    sections = []
    for name in sorted(o.parts, key=lambda part: o.end is not None and part == "step"):
        sections.append(pkgutil.resolve_name(PARTS[name])(o))
        write.show(sections[-1])
        if o.to:  # after each part: a long run that is broken off has not been in vain
            write.as_json(Path(o.to), results, sections)
        if o.markdown:
            write.as_markdown(Path(o.markdown), results, sections)
    return sections


def rate(o: Options, precision: str, shapes: Sequence[Shape]) -> float:
    """GFLOP/s of matrix products at the beginning."""
    call, gflop = product(o.device, DTYPES[precision], shapes)
    return gflop / seconds_on(o.device)(call)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        print("bench: stopped by the keyboard; what parts are done is written", file=sys.stderr)
        sys.exit(130)
