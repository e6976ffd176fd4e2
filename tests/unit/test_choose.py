"""The choice of types against trying all of them, and sizes as they are written in recipes."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from compress.export.choose import Option, choose, smallest, total
from compress.export.config import ExportConfig
from compress.runtime.artifact_sizes import Target, target_of
from pydantic import ValidationError


def drawn(seed: int, tensors: int = 6, kinds: int = 4, large: bool = False) -> dict[str, dict[str, Option]]:
    """Random tensors whose damage falls by about a quarter per bit; some kinds are worse than smaller ones."""
    draw = np.random.default_rng(seed)
    found = {}
    for number in range(tensors):
        weights = int(draw.integers(50, 200)) * (20 if large and number == 0 else 1)
        bits = np.sort(draw.uniform(2, 9, kinds))
        damage = draw.lognormal(0, 1) * weights * 4.0 ** -(bits + draw.normal(0, 0.6, kinds))
        found[f"t{number}"] = {
            f"k{i}": Option(int(weights * b), float(d)) for i, (b, d) in enumerate(zip(bits, damage, strict=True))
        }
    return found


def best(options: dict[str, dict[str, Option]], budget: int) -> float:
    """By trying everything."""
    choices = (total(options, dict(zip(options, kinds, strict=True))) for kinds in product(*options.values()))
    return min(found.damage for found in choices if found.bytes <= budget)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_choice_fits_and_is_nearly_the_best(seed, large):
    options = drawn(seed, large=large)
    least = smallest(options)
    most = sum(max(option.bytes for option in kinds.values()) for kinds in options.values())
    for share in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        budget = int(least + share * (most - least))
        found = total(options, choose(options, budget))
        assert found.bytes <= budget
        # With six tensors the last bytes weigh much; with a model's hundreds they do not.
        assert found.damage <= 1.6 * best(options, budget) + 1e-12


def test_with_many_tensors_nothing_is_left_to_gain():
    """Against the bound from the relaxation: no choice at all is better than the line between two hull points."""
    options = drawn(99, tensors=200)
    budget = smallest(options) * 2
    found = total(options, choose(options, budget))
    assert 0.995 * budget < found.bytes <= budget
    prices = np.geomspace(1e-6, 1e2, 400)
    bound = max(
        sum(min(o.damage + price * o.bytes for o in kinds.values()) for kinds in options.values()) - price * budget
        for price in prices
    )
    assert bound <= found.damage < 1.02 * bound


def test_more_bytes_never_cost_damage():
    options = drawn(3, tensors=40)
    budgets = np.linspace(smallest(options), 3 * smallest(options), 30).astype(int)
    damages = [total(options, choose(options, int(budget))).damage for budget in budgets]
    assert all(later <= 1.001 * earlier for earlier, later in pairwise(damages))
    with pytest.raises(ValueError, match="more than"):
        choose(options, smallest(options) - 1)


@pytest.mark.parametrize(
    ("text", "target", "name"),
    [
        ("80MB", Target(bytes=80_000_000), "80MB"),
        ("1.25 gb", Target(bytes=1_250_000_000), "1.25GB"),
        ("64MiB", Target(bytes=64 << 20), "67.108864MB"),
        ("4.3bits", Target(bits=4.3), "4.3bits"),
        ("512", None, ""),
        ("Q4_K_M", None, ""),
        ("int4", None, ""),
        ("80M", None, ""),
    ],
)
def test_sizes_are_told_from_types(text, target, name):
    found = target_of(text)
    assert found == target
    assert target is None or (found is not None and found.name == name and target_of(name) == target)


def test_a_recipe_names_types_and_sizes_side_by_side():
    config = ExportConfig.model_validate({"gguf": ["Q8_0", {"size": "80MB"}, {"bits": 4.3}, "1GB"]})
    assert config.gguf == ["Q8_0", "80MB", "4.3bits", "1GB"]
    assert ExportConfig.model_validate({"gguf": {"size": 80_000_000}}).gguf == ["80MB"]
    assert ExportConfig.model_validate_json('{"gguf": {"bits": 5}}', strict=True).gguf == ["5bits"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": "big"}, "size: 'big' is no size, such as 80MB"),
        ({"sizze": "60MB"}, "{size: 80MB} or {bits: 4.3}; did you mean 'size'?"),
        ({"size": "4bits"}, "is no size"),
        ({"bits": "4"}, "bits: '4' is no number of bits per weight"),
        ({"bits": 0}, "no number of bits"),
        ({"bytes": 3}, "is {size: 80MB} or {bits: 4.3}"),
        ({"size": "1MB", "bits": 3}, "is {size: 80MB} or {bits: 4.3}"),
        ({"size": 0}, "is no size"),
        (["80MB", {"size": "80 MB"}], "lists a type twice"),
    ],
)
def test_what_is_no_size_is_refused(given, message):
    with pytest.raises(ValidationError) as caught:
        ExportConfig.model_validate({"gguf": given})
    assert message in str(caught.value)
