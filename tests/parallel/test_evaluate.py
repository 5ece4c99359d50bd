"""`dite.evaluate` of a pipeline that several ranks share."""

from ranks import run


def test_every_rank_gets_the_figures_and_the_first_writes_the_report(tmp_path):
    first, second = run(2, "evaluates", folder=str(tmp_path / "report"))
    assert first["psnr"] == second["psnr"] > 60 and (first["wrote"], second["wrote"]) == (True, False)
    assert (tmp_path / "report" / "report.json").exists()
