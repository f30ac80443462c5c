import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from moe_replay.seeds import derive_seed

purposes = st.lists(st.one_of(st.sampled_from(["rollout", "training", "data"]), st.integers(0, 10**6)), max_size=4)


@given(st.integers(0, 2**63), purposes)
def test_seeds_fit_every_generator(seed, what):
    assert 0 <= derive_seed(seed, *what) < 2**31


def test_seeds_never_change():
    """Commits of old runs are reproduced from these."""
    assert [derive_seed(0), derive_seed(0, "rollout", 3, 7), derive_seed(1, "data")] == [306774810, 31588134, 625954323]


def test_seeds_are_the_same_in_another_process_with_another_hash_seed():
    program = "from moe_replay.seeds import derive_seed; print(derive_seed(5, 'training', 2))"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True
        )
        assert int(done.stdout) == derive_seed(5, "training", 2)


def test_different_purposes_get_different_seeds():
    seeds = [
        derive_seed(seed, stage, iteration, row)
        for seed in range(2)
        for stage in ("rollout", "training")
        for iteration in range(25)
        for row in range(25)
    ]
    assert len(set(seeds)) == len(seeds)
