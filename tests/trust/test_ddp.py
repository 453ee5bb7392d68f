"""Two processes (gloo, CPU): the same on both ranks at every step, the same as one process on the joined batch, no hang.

Fixed-step solvers only: an adaptive one chooses its steps by its own rank's half of the batch.
"""

import pytest
from launched import on_two_ranks
from trust import ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank recorded. One launch for all tests: two processes import torch, which is most of the time."""
    return on_two_ranks(ranks.__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("method", ranks.METHODS)
def test_both_ranks_are_equal_at_every_step(seen, method):
    first, second = (rank[method] for rank in seen)
    # Two batches and the end of an epoch each; growth may end the training when its threshold is met.
    assert len(first) >= 3 * 2
    assert first == second


@pytest.mark.parametrize("kind", [*(f"{m}, uneven" for m in ranks.METHODS), "weight, uneven, of a stream"])
def test_a_last_batch_of_another_size_trains_both_ranks_alike(seen, kind):
    first, second = (rank[kind] for rank in seen)
    batches = [step for step in first if step["when"] == "batch"]
    assert len(batches) >= 4 * 3 and len(batches) % 4 == 0
    assert first == second
    assert first[-1]["t_f"] != 1.0


@pytest.mark.parametrize("method", ranks.METHODS)
def test_both_ranks_are_as_one_process_on_the_joined_batch(seen, method):
    alone = ranks.fit(method, devices=1)
    assert len(alone) == len(seen[0][method])
    for step, (one, two) in enumerate(zip(alone, seen[0][method], strict=True)):
        for key, value in one.items():
            if key == "bounds":
                value, two[key] = list(value), list(two[key])
            # 1e-6 is asked; in float64 the sums of two halves leave about 1e-12 after Adam's division by small gradients.
            same = (
                value == two[key]
                if isinstance(value, str | bool | None)
                else two[key] == pytest.approx(value, abs=1e-8)
            )
            assert same, (step, key, value, two[key])


def test_the_comparison_says_something(seen):
    record = seen[0]
    for method in ("weight", "target", "growth"):
        assert record[method][-1]["t_f"] != 1.0
    assert record["growth"][-1]["grown"] >= 1
    prices = [step["price"] for step in record["target"]]
    assert None not in prices and len(set(prices)) > 2


@pytest.mark.parametrize("fault", ranks.FAULTS)
def test_a_fault_on_one_rank_ends_in_an_error_on_all(seen, fault):
    first, second = (rank[fault] for rank in seen)
    assert first is not None and second is not None
    if fault == "another number of batches":
        assert first == second
        assert first[0] == "MisconfigurationException" and "[4, 2]" in first[1]
        return
    if fault.endswith("not known before"):
        assert first == second
        batches = 0 if fault.startswith("no batch") else 2
        assert first[0] == "MisconfigurationException" and f"data of rank 1 end after {batches} batches" in first[1]
        return
    # The rank without the fault learns which one failed, before any gradient is shared.
    assert first[0] == "IntegrationError" and "rank 1" in first[1]
    own = {"the loss is NaN": "rank 1", "the solve fails": "not finite", "an error of the user's own": "own"}[fault]
    assert own in second[1]
