"""compare_runs.py: verdicts on made logs and checkpoints whose differences are known."""

import numpy as np
import pytest
from helpers import refused
from test_analyze_results import write_log

import analyze_results


def compared(folder, capsys, *logs):
    """What the analysis of logs prints of their comparison."""
    analyze_results.main([*map(str, logs), "--output-dir", str(folder / "analysis")])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 + len(str(folder))
    return out


def test_runs_that_agree_and_run_at_another_speed(tmp_path, capsys):
    write_log(tmp_path / "a.csv", [{"duration": 4.0}])
    write_log(tmp_path / "b.csv", [{"duration": 2.0}], script="parallel_cnn_mpi", ranks=2)
    out = compared(tmp_path, capsys, tmp_path / "a.csv", tmp_path / "b.csv")
    row = next(line for line in out.splitlines() if line.split()[:1] == ["b"] and "yes" in line)
    assert row.split()[1:5] == ["1,000", "2.00", "100", "%"]
    assert "b should compute the same as a:\n    batch: the same in all 6 decimals" in out
    assert (tmp_path / "analysis/tables/batch_losses.csv").read_text() == (
        "epoch,batch,a,b\n1,1,1.0,1.0\n1,2,1.0,1.0\n"
    )


def test_a_difference_has_its_place_and_is_marked(tmp_path, capsys):
    write_log(tmp_path / "a.csv", [{"duration": 4.0}, {"duration": 4.0}])
    write_log(tmp_path / "b.csv", [{"duration": 4.0}, {"duration": 4.0, "loss": 1.08}])
    out = compared(tmp_path, capsys, tmp_path / "a.csv", tmp_path / "b.csv")
    assert "batch: differs by up to 0.08, from batch 1 of epoch 2 on" in out
    assert "validation: the same in all 6 decimals" in out
    assert "yes !" in out
    assert "more than rounding explains" in out


def test_runs_with_other_options_need_not_agree(tmp_path, capsys):
    write_log(tmp_path / "a.csv", [{"duration": 4.0}])
    write_log(tmp_path / "b.csv", [{"duration": 4.0, "loss": 3.0}], arguments={"seed": 7})
    out = compared(tmp_path, capsys, tmp_path / "a.csv", tmp_path / "b.csv")
    assert "b need not agree with a:" in out
    assert "!" not in out


@pytest.mark.parametrize(
    ("change", "verdict"),
    [(0.0, "the same, bit for bit"), (1e-12, "the same to 1e-12"), (0.5, "different: up to 0.25")],
)
def test_checkpoints(tmp_path, capsys, change, verdict):
    params = np.array([1.0, -2.0])
    np.savez(tmp_path / "a.npz", params=params, meta=np.array("{}"))
    np.savez(tmp_path / "b.npz", params=params + np.array([change, 0]), meta=np.array("{}"))
    analyze_results.main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    assert capsys.readouterr().out.rstrip().endswith(verdict)


def test_checkpoints_of_other_models(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", params=np.zeros(2))
    np.savez(tmp_path / "b.npz", params=np.zeros(3))
    analyze_results.main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    assert "(2,) and (3,) are different shapes" in capsys.readouterr().out


def test_refusals(tmp_path):
    (tmp_path / "a.npz").write_text("no checkpoint")
    main = analyze_results.main
    assert "a.npz is not a checkpoint" in refused(main, tmp_path / "a.npz", tmp_path / "a.npz")
    assert "b.npz: no such file" in refused(main, tmp_path / "b.npz", tmp_path / "a.npz")
    assert "give two checkpoints" in refused(main, tmp_path / "a.npz", tmp_path / "x.csv")
