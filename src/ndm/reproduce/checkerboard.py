"""The learned transformation of the 2-D checkerboard over time; density and samples beside the data (NDM, figure 1)."""

from ndm.evaluate import Evaluation
from ndm.reproduce.report import Report


def run(report: Report) -> None:
    """Train NDM on the checkerboard, measure it, draw it."""
    words = ["--train.steps", "20", "--train.evaluation_limit", "100"] if report.smoke else []
    model, data = report.train("ndm", "checkerboard.yaml", *words)
    test = data.split("test")
    evaluation = Evaluation(model, test, seed=report.seed, limit=64 if report.smoke else None, progress=True)
    nelbo = evaluation.nelbo(None)
    report.measured("ndm_nelbo", nelbo)
    report.table(["model", "NELBO, nats"], [["NDM", f"{nelbo.nats:.3f} ± {nelbo.stderr:.3f}"]])
