"""The layout: every element has one owner, and one place that no owner changes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from samestep.core.layout import ALIGNMENT, GRANULE, PIECE, Layout, Shape, lay_out

SHAPES = st.lists(
    st.builds(
        Shape,
        num_elements=st.one_of(st.integers(0, 2000), st.integers(GRANULE - 2, 5 * GRANULE), st.just(3 * PIECE + 17)),
        item_bytes=st.sampled_from([2, 4, 8]),
        sum_bytes=st.sampled_from([4, 8]),
        family=st.sampled_from(["a", "b"]),
        divisible=st.booleans(),
    ),
    max_size=8,
)


@given(SHAPES, st.integers(1, 9))
def test_every_element_has_one_owner(shapes, num_workers):
    layout = lay_out(shapes, num_workers)
    owned: dict[int, list[tuple[int, int]]] = {}
    for chunks in layout.chunks:
        for chunk in chunks:
            for piece in chunk:
                assert piece.start < piece.stop
                owned.setdefault(piece.parameter, []).append((piece.start, piece.stop))
    for number, one in enumerate(shapes):
        pieces = owned.get(number, [])
        ends = [0, *(stop for _, stop in pieces)]
        assert [start for start, _ in pieces] == ends[:-1], "pieces leave a gap or overlap"
        assert ends[-1] == one.num_elements
        if not one.divisible:
            assert len(pieces) == (1 if one.num_elements else 0)
        assert all(start % 1024 == 0 for start, _ in pieces)
        assert all(stop - start <= PIECE for start, stop in pieces if one.divisible)


@given(SHAPES, st.integers(1, 9))
def test_memory_does_not_depend_on_workers(shapes, num_workers):
    one, many = lay_out(shapes, 1), lay_out(shapes, num_workers)
    for name in ("offsets", "num_bytes", "sum_offsets", "sum_bytes"):
        assert getattr(one, name) == getattr(many, name)
    assert all(offset % ALIGNMENT == 0 for offset in (*one.offsets, *one.sum_offsets))
    ends = [o + s.num_elements * s.item_bytes for o, s in zip(one.offsets, shapes, strict=True)]
    assert all(end <= start for end, start in zip(ends, one.offsets[1:], strict=False)), "two parameters overlap"


def _bytes_of(layout: Layout, worker: int, offsets, size_of) -> set[tuple[int, int]]:
    return {
        (offsets[p.parameter] + p.start * size_of(p), offsets[p.parameter] + p.stop * size_of(p))
        for chunk in layout.chunks[worker]
        for p in chunk
    }


@given(SHAPES, st.integers(1, 9))
def test_runs_hold_the_pieces(shapes, num_workers):
    layout = lay_out(shapes, num_workers)
    for runs, offsets, size_of, end in (
        (layout.runs, layout.offsets, lambda p: shapes[p.parameter].item_bytes, layout.num_bytes),
        (layout.sum_runs, layout.sum_offsets, lambda p: shapes[p.parameter].sum_bytes, layout.sum_bytes),
    ):
        assert [run.start for run in runs] == [0, *[run.stop for run in runs[:-1]]] or end == 0
        assert runs[-1].stop == end
        for worker, run in enumerate(runs):
            for start, stop in _bytes_of(layout, worker, offsets, size_of):
                assert run.start <= start <= stop <= run.stop


@given(SHAPES, st.integers(1, 9))
def test_chunks_are_of_one_family_and_fit_the_cache(shapes, num_workers):
    for chunks in lay_out(shapes, num_workers).chunks:
        for chunk in chunks:
            assert len({shapes[p.parameter].family for p in chunk}) == 1
            size = sum(p.stop - p.start for p in chunk)
            assert size <= PIECE or len(chunk) == 1


def test_work_is_even():
    layout = lay_out([Shape(40 * GRANULE, 4, 4)] * 3, 4)
    sizes = [sum(p.stop - p.start for chunk in chunks for p in chunk) for chunks in layout.chunks]
    assert sizes == [30 * GRANULE] * 4


def test_coarser_cuts_for_several_threads():
    layout = lay_out([Shape(5 * PIECE, 4, 4)], 3, granule=PIECE)
    cuts = {p.start for chunks in layout.chunks for chunk in chunks for p in chunk}
    assert cuts == {i * PIECE for i in range(5)}
