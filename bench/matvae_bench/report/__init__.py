"""`matvae-bench report`: the evidence, measured on one machine, as JSON, and a page made from it.

quality    accuracy and recall against dimensions, each bundle and precision, beside reference lines
front      the Pareto front of accuracy against bytes, out of the same numbers
latency    latency and images/s against dimensions, images a request, and requests in flight
anatomy    where a request's time goes
costs      throughput, overload and features, in short
agreement  whether a second run says the same
page       the Markdown and the pictures
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection

from matvae_bench.report import anatomy, costs, front, latency, quality
from matvae_bench.report.settings import Results, Settings

SECTIONS = (quality.SECTION, front.SECTION, latency.SECTION, anatomy.SECTION, costs.SECTION)
MEASURED = tuple(section.name for section in SECTIONS if section.measure)


def measure(settings: Settings, only: Collection[str] = MEASURED) -> Results:
    """Measure the sections named `only`, one after the other. Raises BenchmarkError where one cannot be."""
    results: Results = {"quick": settings.quick, "settings": settings.to_dict(), "section_seconds": {}}
    for section in SECTIONS:
        if section.measure is None or section.name not in only:
            continue
        print(f"report: {section.title}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        results[section.name] = section.measure(settings)
        results["section_seconds"][section.name] = time.perf_counter() - started
    return results
