import random

import pytest

from data_prep.blocks import Block, DamagedInput, LineCutter, line_blocks, text_blocks


def cut(chunks, max_bytes=100, block_bytes=64):
    cutter = LineCutter(max_bytes, lambda: 0, block_bytes)
    found = [block for chunk in chunks for block in cutter.feed(chunk)]
    return found + list(cutter.finish())


def lines_of(blocks):
    """Record number and line of every record; None for lost ones. Numbers must be consecutive."""
    found = {}
    for block in blocks:
        lines = [None] if block.lost else block.lines.split(b"\n")[: block.count]
        assert len(lines) == block.count
        found |= {block.first + i: line for i, line in enumerate(lines)}
    assert list(found) == list(range(1, len(found) + 1))
    return list(found.values())


@pytest.mark.parametrize("seed", range(20))
def test_any_chunks_give_the_lines_and_drop_long_ones(seed):
    source = random.Random(seed)
    lines = [bytes(source.choices(b"abc\r\0", k=source.choice([0, 1, 5, 60, 100, 1000]))) for _ in range(40)] + [b"last"]
    data = b"\n".join(lines) + (b"\n" if seed % 2 else b"")
    chunks, rest = [], data
    while rest:
        size = source.choice([1, 3, 50, 500])
        chunks.append(rest[:size])
        rest = rest[size:]
    found = lines_of(cut(chunks))
    assert len(found) == len(lines)
    for line, got in zip(lines, found, strict=True):
        assert got == line or (got is None and len(line) > 100)


def test_a_long_line_is_not_held():
    cutter = LineCutter(100, lambda: 0, 64)
    for _ in range(1000):
        list(cutter.feed(b"x" * 64))
        assert sum(map(len, cutter._partial)) <= 164
    assert lines_of(cutter.finish()) == []


def test_damage_is_a_lost_record_after_the_whole_lines():
    def chunks():
        yield b"one\ntwo\nhal"
        raise DamagedInput("truncated gzip")

    blocks = list(line_blocks(chunks(), 100, lambda: 5))
    assert blocks[0].lines == b"one\ntwo\n" and blocks[0].position == 5
    assert blocks[1] == Block(3, 1, 5, lost="truncated gzip")


def test_nothing_at_all_is_one_lost_record():
    assert [block.lost for block in cut([])] == ["no records in the file"]
    assert [block.lost for block in text_blocks([])] == ["no records in the file"]


def test_texts_are_grouped_and_numbered():
    texts = [(b"x" * 400_000, n) for n in range(5)] + [(None, 5)]
    blocks = list(text_blocks(texts))
    assert [(block.first, block.count) for block in blocks] == [(1, 2), (3, 2), (5, 2)]
    assert blocks[-1].texts[-1] is None
