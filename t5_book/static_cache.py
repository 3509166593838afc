"""A static cache: memory set aside for keys and values, written in place.

Built in chapter 12, "Generating text: greedy decoding and sampling"
(chapters/generation.md). Edit the chapter, not this file.
"""

from torch import Tensor, nn

from t5_book.decoder import BlockCache, DecoderCache

__all__ = []


class StaticBlockCache(BlockCache):
    """A ``BlockCache`` in memory that was set aside.

    It holds no graph for a gradient to go back through: it is for writing texts.

    Attributes:
        source, target: those of ``BlockCache``; ``target`` is a view.
        room: number of tokens for which there is memory.
        store: the memory of keys and values, ``[2 b h room d]``, of which
            what lies after the last token means nothing; None before the first.
    """

    def __init__(self, source: tuple[Tensor, Tensor], room: int):
        super().__init__(source)
        self.room = room
        self.length = 0
        self.store: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens ``[b h q d]`` behind the others; return all, ``[b h k d]``."""
        end = self.length + keys.shape[2]
        if self.store is None or end > self.room:
            self.make_room(end, keys)
        self.store[0, :, :, self.length : end] = keys
        self.store[1, :, :, self.length : end] = values
        self.length = end
        self.target = self.store[0, :, :, :end], self.store[1, :, :, :end]
        return self.target

    def make_room(self, needed: int, keys: Tensor) -> None:
        """Take memory like that of ``keys``; keep what has been written."""
        while self.room < needed:
            self.room *= 2
        b, h, _, d = keys.shape
        old, self.store = self.store, keys.new_empty(2, b, h, self.room, d)
        if old is not None:
            self.store[:, :, :, : self.length] = old[:, :, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows ``[b]`` of the target, in this order."""
        filled = self.store[:, :, :, : self.length]
        filled.copy_(filled.index_select(1, rows))


class StaticCache(DecoderCache):
    """A ``DecoderCache`` in memory that was set aside, with a table of bias rows.

    Args:
        cache: a new one, of ``Decoder.new_cache``.
        room: number of tokens to set memory aside for, 1 or more; it doubles
            when it is full.
    """

    def __init__(self, cache: DecoderCache, room: int):
        blocks = [StaticBlockCache(block.source, room) for block in cache.blocks]
        super().__init__(blocks, cache.cross_mask)
        self.room = room
        self.rows: list[Tensor] = []

    def position_biases(self, tables: nn.ModuleList, q: int, k: int) -> list[Tensor]:
        """What each table adds for the last ``q`` of ``k`` tokens, ``[1 h q k]``."""
        if q > 1:
            return super().position_biases(tables, q, k)
        if not self.rows or k > self.room:
            while self.room < k:
                self.room *= 2
            self.rows = [table(1, self.room) for table in tables]  # [1 h 1 room]
        # The last k of them have the distances k - 1, ..., 0.
        return [row[..., -k:] for row in self.rows]
