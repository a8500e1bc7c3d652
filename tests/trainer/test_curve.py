"""The learning curve's picture: everything that was measured is within its axes."""

import json

import pytest
from matplotlib import pyplot

from aapo_fast.trainer.curve import plot_run


@pytest.mark.parametrize(
    ("rewards", "bottom"), [([0.25, 0.5], -0.02), ([-3.0, 0.5], -3.0), ([-3.0, -1.0], -3.0), ([None, None], -0.02)]
)
def test_rewards_below_zero_are_in_the_picture(tmp_path, monkeypatch, rewards, bottom):
    lines = [{"step": i + 1, "reward": r, "seconds": {"train": 1.0}} for i, r in enumerate(rewards)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    assert plot_run(tmp_path).is_file()
    [figure] = figures
    low, high = figure.axes[0].get_ylim()
    close(figure)
    assert bottom - 0.5 < low <= bottom and all(low <= r <= high for r in rewards if r is not None)
    assert low == bottom or bottom < -0.02
