"""Moments summed where the gradients are, against the accumulator in float64 main memory: the same numbers."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.gradients import moments as module
from bvpo_stats.gradients.engine import BlockLayout
from bvpo_stats.gradients.moments import DeviceMoments, MomentPlan
from bvpo_stats.gradients.stream import GradientBatch
from bvpo_stats.statistics.alpha import alpha_from_summary, in_metric
from bvpo_stats.statistics.moments import Moments, MomentSummary

SIZES = {"layers.0": 700, "layers.1": 900}
MEMBERS = ("t", "e", "m")


def layout(dtype: Any = np.float64) -> BlockLayout:
    places = {"a": ("layers.0", 0, 300), "b": ("layers.0", 300, 400), "c": ("layers.1", 0, 900)}
    return BlockLayout(dict(SIZES), places, dtype)


def plan(prompts: list[str], groups: int | None = 20, **settings: Any) -> MomentPlan:
    counts = {prompt: prompts.count(prompt) for prompt in prompts}
    base = {"members": MEMBERS, "contrast": False, "counts": counts, "n_groups": groups}
    return MomentPlan(**{**base, "layout": layout(), "whole": layout(), **settings})


def gradients(n: int, seed: int = 0, sizes: dict[str, int] = SIZES) -> dict[str, dict[str, Any]]:
    """A common signal, a bias of e, and prompts whose noise is of very different size."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(n, 1)))
    found: dict[str, dict[str, Any]] = {name: {} for name in ("t", "e", "m", "m1", "m2", "t2")}
    for block, d in sizes.items():
        mu, bias, shared, *apart = (rng.normal(size=d), rng.normal(size=d), *rng.normal(size=(6, n, d)))
        for k, name in enumerate(found):
            noise = 3 * scale * (shared + apart[k % 5])
            found[name][block] = (mu + (bias if name == "e" else 0) + noise) / d**0.5
    return found


def batch(vectors: dict[str, Any], prompts: list[str], rows: slice, names: tuple[str, ...] = MEMBERS, *,
          dtype: torch.dtype = torch.float64, second: bool = False) -> GradientBatch:  # fmt: skip
    own = {name: {k: torch.from_numpy(v[rows]).to(dtype) for k, v in vectors[name].items()} for name in (*names, "t2")}
    t2 = own.pop("t2")
    return GradientBatch(prompts[rows], prompts[rows], own, t2 if second else None, [])


def streamed(device: DeviceMoments, vectors: dict[str, Any], prompts: list[str], step: int = 6, **how: Any) -> Any:
    for start in range(0, len(prompts), step):
        device.add(batch(vectors, prompts, slice(start, start + step), **how))
    return device.reduce()


def assert_same(found: MomentSummary, expected: MomentSummary, tolerance: float = 1e-11) -> None:
    for name, value in expected.to_arrays().items():
        mine = found.to_arrays()[name]
        if value.dtype.kind == "f":
            np.testing.assert_allclose(mine, value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)
        else:
            np.testing.assert_array_equal(mine, value, err_msg=name)


@pytest.mark.parametrize("clusters", ["single", "pairs", "uneven"])
@pytest.mark.parametrize("groups", [20, 7, None])
def test_the_reference_accumulator_s_numbers(groups: int | None, clusters: str) -> None:
    sizes = {"single": [1] * 36, "pairs": [2] * 18, "uneven": [1, 2, 3] * 6}[clusters]
    prompts = [f"q{i}" for i, n in enumerate(sizes) for _ in range(n)]
    vectors, second = gradients(36), clusters == "pairs"
    reference, halves = Moments.init(MEMBERS, tuple(SIZES), groups), Moments.init(("h", "d"), tuple(SIZES), 5)
    adam, rng = Moments.init(MEMBERS, tuple(SIZES), groups), np.random.default_rng(5)
    metric = {block: np.exp(rng.normal(size=d)) for block, d in SIZES.items()}
    for rows in (slice(start, start + 6) for start in range(0, 36, 6)):
        part = {name: {k: v[rows] for k, v in vectors[name].items()} for name in vectors}
        reference = reference.update(part, prompts[rows], part["t2"] if second else None)
        scaled = {name: {k: in_metric({"v": v}, metric[k])["v"] for k, v in part[name].items()} for name in MEMBERS}
        adam = adam.update(scaled, prompts[rows])
        contrasts = {
            "h": {k: part["t"][k] - part["e"][k] for k in SIZES},
            "d": {k: part["m1"][k] - part["m2"][k] for k in SIZES},
        }
        halves = halves.update(contrasts, prompts[rows])
    device = DeviceMoments(plan(prompts, groups, contrast=True, metric=metric), list(dict.fromkeys(prompts)))
    found = streamed(device, vectors, prompts, names=(*MEMBERS, "m1", "m2"), second=second)
    assert_same(found.moments, reference.finalize())
    assert_same(found.adam, replace(adam.finalize(), within_prompt=None))
    assert found.second_draws == reference.n_second_draws == (36 if second else 0)
    assert found.drawn_prompts == reference.n_drawn_prompts
    expected = halves.finalize()
    np.testing.assert_allclose(found.halves.U + found.halves.shift, expected.U + expected.shift, rtol=1e-9, atol=1e-11)
    mean = np.concatenate([reference.mean("t")[b] - reference.mean("e")[b] for b in SIZES])
    np.testing.assert_allclose(np.concatenate(list(device.contrasts().values()), axis=1)[0], mean, rtol=0, atol=1e-12)
    means = device.contrasts(by_group=True)["layers.1"]
    names = sorted(reference.groups, key=lambda g: (str(type(g)), g))
    one = [reference.groups[g].means[1][0] - reference.groups[g].means[1][1] for g in names]
    np.testing.assert_allclose(means, np.stack(one), rtol=0, atol=1e-12)


@pytest.mark.parametrize("narrow", [1, 10**9])
def test_alpha_of_float32_sums_is_that_of_float64(narrow: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In float16 a closed group has the rounding errors of its d numbers, here as many as an adapter's block."""
    monkeypatch.setattr(module, "NARROW", narrow)
    sizes = {"layers.0": 400_000 if narrow == 1 else 20_000}
    prompts = [f"q{i}" for i in range(45)]
    vectors, here = gradients(45, 3, sizes), BlockLayout(sizes, {"a": ("layers.0", 0, sizes["layers.0"])}, np.float32)
    reference = Moments.init(MEMBERS, tuple(sizes), 20).update({n: vectors[n] for n in MEMBERS}, prompts).finalize()
    device = DeviceMoments(plan(prompts, layout=here, whole=here), prompts, tmp_path / "moments.bin")
    found = streamed(device, vectors, prompts, 5, dtype=torch.float32).moments
    for batch_size in (1, 128):
        alphas = [alpha_from_summary(s, batch_size=batch_size, eta_l=1.0, level=0.95) for s in (found, reference)]
        mine, exact = ([x.unclipped, x.low, x.high] for x in alphas)
        np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-6)
        assert 0 < alphas[1].unclipped < 1


def test_weights_without_a_gradient_leave_every_number_alone() -> None:
    prompts, vectors = [f"q{i}" for i in range(24)], gradients(24)
    for name in vectors:
        vectors[name]["layers.0"][:, :300] = 0
    whole = streamed(DeviceMoments(plan(prompts), prompts), vectors, prompts)
    cut = {name: {**blocks, "layers.0": blocks["layers.0"][:, 300:]} for name, blocks in vectors.items()}
    fewer = BlockLayout(
        {"layers.0": 400, "layers.1": 900}, {"b": ("layers.0", 0, 400), "c": ("layers.1", 0, 900)}, np.float64
    )
    device = DeviceMoments(plan(prompts, layout=fewer), prompts)
    assert_same(streamed(device, cut, prompts).moments, whole.moments)
    assert device.plan.open_bytes == 3 * 1300 * 8


def run_of(prompts: list[str], path: Path, run: str = "mine") -> DeviceMoments:
    return DeviceMoments(plan(prompts, 4), prompts, path, run)


def test_what_was_saved_is_gone_on_from_to_the_last_bit(tmp_path: Path) -> None:
    prompts = sorted((f"q{i}" for i in range(30)), key=plan([f"q{i}" for i in range(30)], 4).place.__getitem__)
    vectors, path = gradients(30), tmp_path / "moments.bin"
    whole = streamed(run_of(prompts, tmp_path / "whole.bin"), vectors, prompts, 4).moments
    device = run_of(prompts, path)
    for start in range(0, 12, 4):
        device.add(batch(vectors, prompts, slice(start, start + 4)))
    arrays = {name: values.copy() for name, values in device.to_arrays().items()}  # as a file would hold them
    assert sum(name.startswith("open:") for name in arrays) == 1
    device.add(batch(vectors, prompts, slice(12, 16)))  # after the save: lost with the process
    again = run_of(prompts, path)
    again.restore(arrays, torch.device("cpu"))
    assert again.done == set(prompts[:12])
    for start in range(12, 30, 4):
        again.add(batch(vectors, prompts, slice(start, start + 4)))
    found = again.reduce().moments
    for name, value in whole.to_arrays().items():
        np.testing.assert_array_equal(found.to_arrays()[name], value, err_msg=name)


def test_files_of_another_run_damaged_ones_and_prompts_twice(tmp_path: Path) -> None:
    prompts, vectors, path = [f"q{i}" for i in range(12)], gradients(12), tmp_path / "moments.bin"
    device = run_of(prompts, path)
    streamed(device, vectors, prompts)
    arrays = device.to_arrays()
    with pytest.raises(UserError, match=r"prompt 'q0' was added before"):
        device.add(batch(vectors, prompts, slice(0, 6)))
    with pytest.raises(UserError, match=r"moments\.bin holds the moments of another run\. Delete it"):
        run_of(prompts, path, "another")
    with pytest.raises(UserError, match="another run"):
        run_of(prompts, tmp_path / "new.bin", "another").restore(arrays, torch.device("cpu"))
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"moments\.bin: .*checksum differs"):
        run_of(prompts, path).restore(arrays, torch.device("cpu"))
    path.unlink()
    with pytest.raises(UserError, match=r"moments\.bin: No such file"):
        run_of(prompts, path).restore(arrays, torch.device("cpu"))
    vectors["e"]["layers.1"][3, 5] = np.nan
    with pytest.raises(UserError, match=r"gradient 'e' of prompt q3 is not finite"):
        run_of(prompts, tmp_path / "nan.bin").add(batch(vectors, prompts, slice(0, 6)))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    prompts, vectors = [f"q{i}" for i in range(12)], gradients(12)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # the kernel's EFBIG stands in for a full disk
    try:
        with pytest.raises(UserError, match=r"Disk full while writing .*moments\.bin\. Free some") as caught:
            streamed(run_of(prompts, tmp_path / "moments.bin"), vectors, prompts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
