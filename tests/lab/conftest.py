import pytest

from bvpo_stats.lab.oracle import Oracle, OracleConfig, build_oracle

# 7 traces, 3 answers, 2 prompts: small enough to write out every pair of traces.
SMALL = {"n_symbols": 2, "max_trace": 2, "n_answers": 3, "n_prompts": 2, "seed": 3}


@pytest.fixture(scope="session")
def at_reference() -> Oracle:
    """theta_ref, temperature 1."""
    return build_oracle(OracleConfig(**SMALL))


@pytest.fixture(scope="session")
def cooled() -> Oracle:
    """theta_ref, temperature 0.8."""
    return build_oracle(OracleConfig(**SMALL, temperature=0.8))


@pytest.fixture(scope="session")
def drifted() -> Oracle:
    """Off theta_ref and at temperature 0.8: nothing is special."""
    return build_oracle(OracleConfig(**SMALL, temperature=0.8, drift=0.05))


@pytest.fixture(scope="session")
def default() -> Oracle:
    """The default sizes (V = 4, T = 4), drifted, at temperature 0.8."""
    return build_oracle(OracleConfig(drift=0.05, temperature=0.8))


@pytest.fixture(scope="session")
def minute() -> Oracle:
    """2 traces, 2 answers, 2 prompts: 8 examples in all, so that tuples of examples can be enumerated."""
    return build_oracle(OracleConfig(n_symbols=1, max_trace=1, n_answers=2, n_prompts=2, drift=0.1, seed=1))
