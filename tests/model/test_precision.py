"""bfloat16 is offered on CPUs where it is faster, and never taken by itself."""

from __future__ import annotations

import pytest
import torch

from bvpo_stats.model import precision
from bvpo_stats.model.policy import Policy, load_policy


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setattr(precision, "_LEAST", 16)
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    return load_policy("embedded")


def timed(monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda w: float32 if w.dtype == torch.float32 else bfloat16)


def test_it_is_offered_where_it_is_faster(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed(monkeypatch, 2.0, 0.8)
    assert precision.offer_bfloat16(policy) == pytest.approx(2.5)
    said = capsys.readouterr().err
    assert "bfloat16 2.5 times as fast as float32: `dtype='bfloat16'`" in said
    assert said.count("\n") == 1
    assert policy.model.dtype == torch.float32


def test_it_is_not_offered_where_it_is_not(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed(monkeypatch, 1.0, 0.9)
    assert precision.offer_bfloat16(policy) is None
    timed(monkeypatch, 2.0, 0.1)
    monkeypatch.setattr(precision, "_LEAST", 10**6)  # a small model: products are not what takes time
    assert precision.offer_bfloat16(policy) is None
    monkeypatch.setattr(precision, "_LEAST", 16)
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    assert precision.offer_bfloat16(policy) is None
    assert capsys.readouterr().err == ""


def test_products_are_timed_and_this_cpu_is_asked() -> None:
    assert 0 < precision._seconds(torch.ones(64, 32)) < 1
    assert precision.cpu_has_bfloat16() in (True, False)
