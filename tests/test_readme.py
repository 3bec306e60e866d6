"""The README's Python runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_of_python_train_and_sample() -> None:
    torch.manual_seed(0)
    (code,) = re.findall(
        r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    code = (
        code.replace("(8, 1, 28, 28)", "(2, 1, 12, 12)")
        .replace("(4, 1, 28, 28)", "(2, 1, 12, 12)")
        .replace("steps=50", "steps=5")
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert all(bool(term.isfinite().all()) for term in scope["bound"].terms().values())
    for part in (scope["model"].transform, scope["model"].predictor):
        assert any(p.grad is not None and bool((p.grad != 0).any()) for p in part.parameters())
    scope["model"].decoder.check(scope["samples"])
    assert scope["samples"].shape == (2, 1, 12, 12)
