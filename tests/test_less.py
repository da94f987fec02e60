"""The example on the demo's own rows: rows come out under their own skill far oftener than by chance, and oftener than by the product."""

from __future__ import annotations

from examples import less


def test_rows_come_out_under_their_own_skill(tmp_path):
    own, cosine, product = less.right(less.write(tmp_path, 6))
    assert len(own) == 6 * len(less.SKILLS) == 48
    assert cosine.mean() > 0.7 and product.mean() < cosine.mean()  # chance: one in eight
