"""Time to score 64 rollouts with an async reward that waits two seconds, as one that calls a service does.

The other side is the same reward with `reward_concurrency: 1`, which runs one call after the other. A reward
that is not async shows the overhead of a call: it returns at once, so that the time is that of the processes'
communication.

    python benchmarks/reward_concurrency.py
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

from rlkit.scoring import RewardRunner

RESULT = Path(__file__).parent / "results" / "reward_concurrency.json"
NUM_ROLLOUTS = 64
WAIT_SECONDS = 2.0


async def wait(completion: str) -> float:
    await asyncio.sleep(WAIT_SECONDS)
    return float(len(completion))


def at_once(completion: str) -> float:
    return float(len(completion))


def seconds_per_batch(reward: Callable[..., object], num_rollouts: int, **options: dict[str, int]) -> float:
    """Return the seconds for the second batch; the first one starts whatever is started lazily."""
    rows = [{"completion": "x" * 2000} for _ in range(num_rollouts)]
    with RewardRunner({"reward": reward}, **options) as runner:  # type: ignore[arg-type]
        runner(rows[:1], 1)
        started = time.perf_counter()
        scores = runner(rows, 1)
        seconds = time.perf_counter() - started
    assert scores.invalid == [None] * num_rollouts
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    concurrent = seconds_per_batch(wait, NUM_ROLLOUTS)
    # A quarter of the rollouts, since one after the other takes minutes.
    sequential = 4 * seconds_per_batch(wait, NUM_ROLLOUTS // 4, max_concurrent={"reward": 1})
    result = {
        "rollouts": NUM_ROLLOUTS,
        "seconds each call waits": WAIT_SECONDS,
        "seconds, concurrent": round(concurrent, 2),
        "seconds, one after the other": round(sequential, 2),
        "speedup": round(sequential / concurrent, 1),
        "within 3 seconds": concurrent <= 3.0,
        "milliseconds per call of a reward that does not wait": round(
            1000 * seconds_per_batch(at_once, 2000) / 2000, 3
        ),
    }
    print(json.dumps(result, indent=1))
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
