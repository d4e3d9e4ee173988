"""Time ONNX graphs in ONNX Runtime, against each other and against drift."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from hawqkit.errors import HawqkitError
from hawqkit.records import Floats
from hawqkit.targets.onnx_parts import EXTRA

# One reading covers so many seconds at least: a clock reads to 0.1 us, and a thread is interrupted
# for some 10 us now and then.
READING_SECONDS = 1e-3
CLOCK = 1e-3  # milliseconds: so well a short time is known
WARM_UP = 5
QUANTILE = 0.25  # of readings, see `_low`
ATTEMPTS = 4  # at a reading that nobody disturbs
BLOCK = 8  # sessions that are open at once, so that a large model does not fill the memory
SETTINGS = {"session.qdq_matmulnbits_accuracy_level": "1"}

Timed = tuple[Any, Mapping[str, Any]]  # a graph and its inputs


def runtime_package() -> Any:
    """Return the `onnxruntime` package.

    Raises:
        HawqkitError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise HawqkitError(
            f"latency is measured in ONNX Runtime, which is missing: pip install '{EXTRA}'."
        ) from error
    return onnxruntime


def open_session(graph: Any, *, threads: int, optimize: bool = True) -> Any:
    """Return a session on the CPU.

    Matrix products with weights of 4 and 8 bits keep float inputs, as the formats say; by default
    ONNX Runtime would round these to 8 bits.

    Args:
        graph: `onnx.ModelProto`.
        threads: of one operation; operations follow each other.
        optimize: whether the runtime may fuse nodes.
    """
    ort = runtime_package()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors alone
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    for name, value in SETTINGS.items():
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def time_graphs(
    graphs: Sequence[Timed], *, threads: int, rounds: int, seed: int
) -> tuple[Floats, Floats]:
    """Return the time of one run of each graph, and its standard error, in milliseconds.

    The time is the lower quartile of the readings: what disturbs a run only adds to it.

    Readings in which the system gave the core to another process are taken again. Graphs are read
    in turn, in a new order each round, so that what slows the machine for a while slows all of
    them. They are opened in blocks; the first graph is in every block, and times of a block are
    multiplied by its time over all blocks over that in the block.

    Args:
        graphs: `onnx.ModelProto` and its inputs by name.
        threads: of one operation.
        rounds: readings of each graph.
        seed: of the orders.

    Returns:
        (times, standard errors), each of the graphs' number.
    """
    generator = np.random.default_rng(seed)
    starts = range(1, max(len(graphs), 2), BLOCK - 1)
    blocks = [[0, *range(s, min(s + BLOCK - 1, len(graphs)))] for s in starts]
    readings = [_read_block([graphs[i] for i in b], threads, rounds, generator) for b in blocks]
    reference = np.quantile(np.concatenate([r[0] for r in readings]), QUANTILE)
    lows, errors = np.zeros(len(graphs)), np.zeros(len(graphs))
    for block, times in zip(blocks, readings, strict=True):
        factor = float(reference / np.quantile(times[0], QUANTILE))
        for row, index in enumerate(block[1:], 1):
            lows[index], errors[index] = _low(times[row] * factor)
    lows[0], errors[0] = _low(np.concatenate([r[0] for r in readings]))
    return lows, errors


def _read_block(
    graphs: Sequence[Timed], threads: int, rounds: int, generator: np.random.Generator
) -> Floats:
    """Return (graphs, rounds) milliseconds of one run."""
    sessions = [(open_session(graph, threads=threads), dict(feed)) for graph, feed in graphs]
    repeats = []
    for session, feed in sessions:
        for _ in range(WARM_UP):
            session.run(None, feed)
        repeats.append(max(1, round(READING_SECONDS / max(_seconds(session, feed, 2), 1e-7))))
    times = np.zeros((len(sessions), rounds))
    for column in range(rounds):
        for row in generator.permutation(len(sessions)):
            session, feed = sessions[row]
            session.run(None, feed)  # brings its weights back into the cache
            times[row, column] = 1e3 * _undisturbed(session, feed, repeats[row], threads)
    return times


def _undisturbed(session: Any, feed: Mapping[str, Any], repeats: int, threads: int) -> float:
    """Return the seconds of one run, read again where another process took the core meanwhile.

    If that happens each time, as with runs that are longer than the turns a busy system gives, one
    thread's own time on the core is as good.
    """
    least = math.inf
    for _ in range(ATTEMPTS):
        before, busy = interruptions(), time.thread_time()
        seconds = _seconds(session, feed, repeats)
        if interruptions() == before:
            return seconds
        least = min(least, (time.thread_time() - busy) / repeats if threads == 1 else seconds)
    return least


def interruptions() -> int:
    """Return how often the system took a core from this process; 0 where it does not tell."""
    return int(psutil.Process().num_ctx_switches().involuntary)


def _seconds(session: Any, feed: Mapping[str, Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        session.run(None, feed)
    return (time.perf_counter() - start) / repeats


def _low(values: Floats) -> tuple[float, float]:
    """Return the lower quartile and its standard error, from the order statistics around it.

    Whatever disturbs a run adds to it, so the lower quartile stays where it is while the median
    moves with the load of the machine; on an idle one they are the same. The number of readings
    below a quantile q is binomial, n q +- sqrt(n q (1 - q)), so the readings of these two ranks
    enclose it with the probability of one standard error.
    """
    ordered = np.sort(values)
    n = len(ordered)
    middle, spread = n * QUANTILE, np.sqrt(n * QUANTILE * (1 - QUANTILE))
    low = max(0, int(np.floor(middle - spread)))
    high = min(n - 1, int(np.ceil(middle + spread)))
    return float(np.quantile(ordered, QUANTILE)), float(ordered[high] - ordered[low]) / 2
