"""The benchmarks' own arithmetic: interleaved samples, rows, and what make bench-compare calls a change."""

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from benchmarks.chunked_matmul import chunked_matmul_scan  # noqa: E402
from benchmarks.measure import interleave, ratio, rows, write_report  # noqa: E402


def test_samples_are_taken_in_turn_and_ratios_pair_them():
    order = []
    samples = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, rounds=3)
    assert [len(values) for values in samples.values()] == [3, 3]
    changes = sum(x != y for x, y in zip(order[:-1], order[1:], strict=True))
    assert changes == 7  # a b to size the samples, then three rounds
    assert ratio({"ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 40.0]}, "peer", "ours") == 3.0


def test_the_chunked_matmul_peer_is_a_scan():
    import torch

    from megatron_fipo.ops import discounted_scan

    x_BL = torch.randn(3, 300)
    expected = discounted_scan(x_BL.flatten(), torch.arange(4) * 300, 0.97)
    torch.testing.assert_close(chunked_matmul_scan(x_BL, 0.97).flatten(), expected, rtol=1e-4, atol=1e-4)


def test_compare_names_what_moved_and_not_noise(tmp_path, capsys):
    def report(name, ours, peer):
        samples = {"ours": [ours, ours * 1.01, ours * 1.02], "peer": [peer, peer * 1.3, peer * 1.6]}
        table = rows("case", samples, ours="ours", tokens=1000, bytes_per_token=8)
        write_report(tmp_path / name, {"key": ratio(samples, "peer", "ours")}, table, {"threads": 2})
        return str(tmp_path / name)

    before, after = report("a.json", 1.0, 3.0), report("b.json", 1.5, 3.2)
    assert set(json.loads(Path(before).read_text())) == {"ratios", "rows", "environment"}
    printed = subprocess.run(
        [sys.executable, str(TOOLS / "bench_compare.py"), before, after], capture_output=True, text=True, check=True
    ).stdout
    assert "1 of 2 timings moved beyond noise" in printed
    assert "ours" in printed.splitlines()[-1] and "+50.0%" in printed.splitlines()[-1]
