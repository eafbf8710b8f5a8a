"""A stored update is what was added, bit by bit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from gradstore.capture.layers import matrix
from gradstore.errors import StoreDamaged
from gradstore.unlearn.update import add, pack


@given(st.sets(st.integers(0, 39)), st.sampled_from([torch.float32, torch.bfloat16]))
def test_an_update_comes_back_bit_by_bit(rows: set[int], dtype: torch.dtype) -> None:
    update = torch.zeros(40, 3, dtype=dtype)
    for row in rows:
        update[row, row % 3] = -0.0 if row % 2 else torch.randn(()).to(dtype)
    stored = load(pack({"embedding": update}))
    assert ("embedding.rows" in stored) == (len(stored["embedding"]) < 40)
    if "embedding.rows" in stored:
        assert stored["embedding.rows"].tolist() == sorted(rows)
        dense = pack({"embedding": torch.ones_like(update)})
        assert len(pack({"embedding": update})) <= len(dense) + 100  # its header
    back = torch.zeros_like(update).index_copy_(
        0, stored.get("embedding.rows", torch.arange(40)), stored["embedding"]
    )
    assert torch.equal(back, update)
    assert torch.equal(back.signbit(), update.signbit())


def test_adding_a_stored_update_gives_the_same_bits(tmp_path: Path) -> None:
    weight, update = torch.randn(50, 7), torch.randn(50, 7)
    weight[3] = update[5:] = -0.0
    for number, given_update in enumerate((update, torch.cat([update[:9], update[9:] * 0]))):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(pack({"embedding": given_update}))
        found = weight.clone()
        add({"embedding": found}.__getitem__, path, 0.2371)
        expected = weight.clone().add_(given_update, alpha=0.2371)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    for content in (b"", pack({"embedding": torch.ones(4, 7)}), path.read_bytes()[:-1]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(StoreDamaged, match=r"bad is no update of this model's weights \("):
            add({"embedding": weight}.__getitem__, tmp_path / "bad", 1.0)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_weights_of_other_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, update = torch.randn(shape), torch.randn(shape)
    (tmp_path / "update").write_bytes(pack({"scale": matrix(update)}))
    assert matrix(update).shape[1:] == (shape or (1,))[-1:]
    found = weight.clone()
    add({"scale": found}.__getitem__, tmp_path / "update", 0.5)
    assert torch.equal(found, weight.clone().add_(update, alpha=0.5))
