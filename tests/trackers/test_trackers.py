"""The trackers' tests with the real clients of W&B and MLflow, in an environment that `make trackers` makes."""

from side_environment import run_cases


def test_real_clients(tmp_path):
    told = run_cases("trackers", "unit/test_observe_trackers.py", tmp_path)
    assert " passed" in told and "skipped" not in told
