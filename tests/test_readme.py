"""The README's Python code runs as written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ndm

README = Path(__file__).parents[1] / "README.md"
STEPS = 150


@pytest.mark.slow
def test_the_readme_trains_samples_measures_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training lowers the bound, samples follow the data, a loaded model has the same bound."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = README.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 25
    for full, short in (("range(1000)", f"range({STEPS})"), ("test[:100]", "test[:4]")):
        assert full in code
        code = code.replace(full, short)
    scope: dict[str, Any] = {}
    exec(code, scope)
    model, test = scope["model"], scope["test"]

    def bound(model: ndm.NDM) -> torch.Tensor:
        return model.bound(test[:500], generator=torch.Generator().manual_seed(0)).total.mean()

    torch.testing.assert_close(bound(ndm.NDM.from_pretrained("moons")), bound(model))
    assert bound(model) < 2.0
    spread = scope["samples"].std(0)
    torch.testing.assert_close(spread, test[:].std(0), rtol=0.5, atol=0)
    assert bool(scope["log_p"].isfinite().all())
