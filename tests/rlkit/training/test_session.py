"""The parts of a session that need no training run."""

import json
import sys
from types import SimpleNamespace

import pytest

from rlkit.arguments.keys import SFTArguments, TrainArguments
from rlkit.errors import UserError
from rlkit.training.session import Session, make_runner


def test_summary_without_plotly_says_how_to_write_the_report_later(monkeypatch, open_run, tmp_path):
    """A long run must not fail at its end because a package for plots is missing."""
    run_dir = open_run(tmp_path / "run")
    (run_dir.path / "config.yaml").write_text("environment: causal-v1\n")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    summary = Session.summary(SimpleNamespace(directory=run_dir))
    assert summary.splitlines() == [
        f"model:  {run_dir.path / 'model'}",
        "report: not written: reports need plotly: pip install plotly "
        f"(afterwards: rlkit report {run_dir.path})",
    ]


def test_reward_concurrency_takes_the_names_of_the_config():
    def brief(completion):
        return 1.0

    rewards, environment = {"brief_2": brief, "metric": brief}, SimpleNamespace(metric="metric")
    for name in ("mine.py:brief", "brief_2", "metric"):
        args = TrainArguments(rewards=["mine.py:brief"], reward_concurrency=json.dumps({name: 1}))
        make_runner(args, rewards, environment).close()
    with pytest.raises(UserError, match=r"'mine\.py:breif', which is not a reward"):
        make_runner(TrainArguments(reward_concurrency='{"mine.py:breif": 1}'), rewards, environment)
    args = TrainArguments(rewards=["mine.py:brief"], reward_concurrency='{"mine.py:brief": 1}')
    make_runner(args, rewards, environment, excluded=["brief_2"]).close()
    make_runner(SFTArguments(reward_concurrency='{"metric": 1}'), rewards, environment).close()
