import pytest
import torch

from bvpo_stats.model.sinks import Mixture


@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mixture_is_the_matrix_product(density: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(15, 40, generator=generator, dtype=torch.float64)
    matrix[torch.rand(15, 40, generator=generator) >= density] = 0
    matrix[7] = 0  # a row of nothing
    mixture = Mixture.of(matrix)
    assert (mixture.columns is None) == (density > 0.5)
    scores = torch.randn(40, 3, 5, generator=generator).to(dtype)
    mixed = mixture(scores)
    assert mixed.dtype == dtype
    assert mixed.shape == (15, 3, 5)
    expected = (matrix @ scores.double().flatten(1)).unflatten(1, (3, 5))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(mixed.double(), expected, rtol=tolerance, atol=tolerance)
