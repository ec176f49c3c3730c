"""``./scripts/bench NAME [--json FILE] [--plot FILE] [--quick]``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from scripts.benchmarks import (
    balancing,
    chaos,
    distill,
    embed,
    fuzz,
    long_text,
    overhead,
    scaling,
    streaming,
)
from scripts.benchmarks.report import document, show

BENCHMARKS = {
    "overhead": overhead.run,
    "embed": embed.run,
    "balancing": balancing.run,
    "scaling": scaling.run,
    "chaos": chaos.run,
    "long_text": long_text.run,
    "streaming": streaming.run,
    "distill": distill.run,
    "fuzz": fuzz.run,
}
PLOTS = {"balancing": balancing.plot, "scaling": scaling.plot, "streaming": streaming.plot}


def main() -> None:
    """Run one benchmark, show it as a table, and write it as JSON or draw it if asked."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results here: SVG or PNG")
    parser.add_argument("--quick", action="store_true", help="check that it works; no figures")
    chosen = parser.parse_args()
    if chosen.plot and chosen.name not in PLOTS:
        parser.error(f"no plot of {chosen.name}; there is one of {', '.join(PLOTS)}")
    results = BENCHMARKS[chosen.name](quick=chosen.quick)
    show(chosen.name, results)
    if chosen.json:
        chosen.json.write_text(json.dumps(document(chosen.name, results), indent=2) + "\n")
    if chosen.plot:
        PLOTS[chosen.name](results, chosen.plot)


if __name__ == "__main__":
    main()
