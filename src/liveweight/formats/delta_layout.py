"""How the Delta format lies in memory: streams of entries in slices of 32, and back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

LANES = 32  # streams of a slice: the threads of a warp
GROUP = 8  # entries that a stream's end is filled up to: 16 bytes of 16-bit values
BITS = (4, 5, 6, 8)  # of a delta
CLASSES = 8  # of columns that streams keep apart, so that 16-byte gathers meet no bank twice
MOST_PART = 32768  # columns that one part may have, so that its first columns fit int16

# A GPU with 132 multiprocessors needs about 8 warps on each, to keep enough loads in flight.
_SLICES = 1024
_LEAST_STREAM = 32  # entries; shorter streams have too much filling
HEAD = 4  # groups that a lane loads at once
_HEAD_COST = 0.02  # of the bytes, what heads may cost where streams are shorter than they


@dataclasses.dataclass(frozen=True)
class Layout:
    """The numbers that say how a weight [rows, columns] is cut.

    bits of a delta; lanes (streams) that share a row; columns of a part; groups of a head, 0 or 4;
    classes of columns, 1 or 8: a stream holds columns of one class, column modulo classes, and its
    deltas count in steps of so many columns. Place (p * rows + n) * classes + c is what row n has
    in part p of class c.
    """

    rows: int
    columns: int
    bits: int
    lanes: int
    part: int
    head: int = 0
    classes: int = 1

    @property
    def lanes_per_class(self) -> int:
        return self.lanes // self.classes

    @property
    def head_words(self) -> int:
        """Rows of words that a head takes."""
        return self.head * GROUP * self.bits // 32

    @property
    def parts(self) -> int:
        return max(1, -(-self.columns // self.part))

    @property
    def rows_per_slice(self) -> int:
        return LANES // self.lanes

    @property
    def slices(self) -> int:
        """Slices of one part."""
        return -(-self.rows // self.rows_per_slice)


def pick_part(columns: int) -> int:
    """Return the columns of a part: one part if it may be, else equal ones."""
    parts = max(1, -(-columns // MOST_PART))
    return max(GROUP, -(-columns // (parts * GROUP)) * GROUP)


def pick_bits(gaps: Tensor) -> int:
    """Return the bits of a delta that make the fewest bytes, for the gaps between columns."""
    kept = gaps.numel()

    def size(bits: int) -> int:
        reach = (1 << bits) - 1
        return (kept + int(((gaps - 1).clamp(min=0) // reach).sum())) * (16 + bits)

    return min(BITS, key=size)


def pick_lanes(layout: Layout, entries: int) -> int:
    """Return how many streams a row is cut into: as few as keep a GPU busy, as filling costs."""
    rows, lanes = layout.parts * layout.rows, layout.classes
    while (
        lanes < LANES
        and -(-rows * lanes // LANES) < _SLICES
        and entries >= 2 * lanes * _LEAST_STREAM * rows
    ):
        lanes *= 2
    return lanes


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Entries row after row, fillers among them where a gap is longer than a delta can say.

    source   kept weight that the entry holds, or -1 for a filler: int64 [entries]
    place    of the entry: int64 [entries]
    column   within its part, in steps of `classes`: int64 [entries]
    lengths  entries of each place: int64 [parts * rows * classes]
    """

    source: Tensor
    place: Tensor
    column: Tensor
    lengths: Tensor


def gaps_of(place: Tensor, column: Tensor) -> Tensor:
    """Return how far each kept column is from the one before it in its row; 0 for the first."""
    gaps = torch.zeros_like(column)
    same = place[1:] == place[:-1]
    gaps[1:] = torch.where(same, column[1:] - column[:-1], 0)
    return gaps


def fill_gaps(place: Tensor, column: Tensor, gaps: Tensor, layout: Layout) -> Sequence:
    """Return the sequence in which no column is more than 2^bits - 1 behind the one before it."""
    reach = (1 << layout.bits) - 1
    fillers = (gaps - 1).clamp(min=0) // reach
    counts = fillers + 1
    total = int(counts.sum())
    source = torch.repeat_interleave(counts, output_size=total)
    ends = counts.cumsum(0)
    back = ends[source] - 1 - torch.arange(total, device=column.device)  # 0: the weight itself
    step = (fillers[source] - back + 1) * reach
    filler_column = column[source] - gaps[source] + step
    places = place[source]
    return Sequence(
        torch.where(back == 0, source, -1),
        places,
        torch.where(back == 0, column[source], filler_column),
        torch.bincount(places, minlength=layout.parts * layout.rows * layout.classes),
    )


@dataclasses.dataclass(frozen=True)
class Slices:
    """Where everything goes.

    order    [slices of all parts, rows per slice] int32: row, longest first, -1 for no row
    offsets  [slices of all parts + 1, 2] int32: of each tail, first group and first row of words
    slot     int64 [parts * rows]: which place of `order`, flattened, a row has
    """

    order: Tensor
    offsets: Tensor
    slot: Tensor


def arrange(lengths: Tensor, layout: Layout) -> Slices:
    """Return the slices for rows of these lengths."""
    device, per = lengths.device, layout.rows_per_slice
    padded = layout.slices * per
    by_part = _longest_streams(lengths, layout)
    ranked, rows = by_part.sort(dim=1, descending=True, stable=True)
    order = torch.full((layout.parts, padded), -1, dtype=torch.int32, device=device)
    order[:, : layout.rows] = rows.int()
    first = torch.arange(layout.parts, device=device)[:, None]
    slot = torch.empty_like(by_part)
    ranks = torch.arange(layout.rows, device=device).expand_as(rows)
    slot.scatter_(1, rows, ranks + first * padded)
    groups = (_groups(ranked, layout) - layout.head).clamp(min=0)
    words = _ceil(groups * (GROUP * layout.bits), 32)
    heads = torch.tensor([[layout.head, layout.head_words]], device=device) * groups.numel()
    tails = torch.stack((groups, words), 1).cumsum(0)
    offsets = torch.cat((heads, heads + tails))
    if int(offsets[-1].max()) >= 2**31:
        raise ValueError(f"Delta: too many entries, expected fewer than {2**31 * 256}")
    return Slices(order.reshape(-1, per), offsets.int(), slot.reshape(-1))


def _longest_streams(lengths: Tensor, layout: Layout) -> Tensor:
    """Return how long the longest stream of each row is: int64 [parts, rows]."""
    by_class = lengths.reshape(layout.parts, layout.rows, layout.classes)
    return _ceil(by_class.amax(2), layout.lanes_per_class)


def _groups(ranked: Tensor, layout: Layout) -> Tensor:
    """Return the groups of each slice; streams [parts, rows] get shorter along the rows."""
    return _ceil(ranked[:, :: layout.rows_per_slice].reshape(-1), GROUP)


def pick_head(lengths: Tensor, layout: Layout) -> int:
    """Return whether heads pay: HEAD, or 0 where too many streams are shorter than they."""
    ranked = _longest_streams(lengths, layout).sort(dim=1, descending=True).values
    groups = _groups(ranked, layout)
    filling = int((HEAD - groups).clamp(min=0).sum())
    return HEAD if int(groups.sum()) > 0 and filling <= _HEAD_COST * int(groups.sum()) else 0


def _ceil(a: Tensor, b: int) -> Tensor:
    return (a + b - 1) // b


def streams(sequence: Sequence, slices: Slices, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return slice, lane and place in its stream of every entry: int64 each."""
    lengths, place = sequence.lengths, sequence.place
    first = lengths.cumsum(0) - lengths
    at = torch.arange(place.numel(), device=place.device) - first[place]
    share = _ceil(lengths, layout.lanes_per_class)[place]  # entries of one stream
    slot = slices.slot[place // layout.classes]
    # Neighbouring lanes have different classes.
    in_row = at // share * layout.classes + place % layout.classes
    lane = slot % layout.rows_per_slice * layout.lanes + in_row
    return slot // layout.rows_per_slice, lane, at % share


def value_index(slices: Slices, where: tuple[Tensor, Tensor, Tensor], layout: Layout) -> Tensor:
    """Return where in `values` each entry stands: int64 [entries]."""
    part, lane, at = where
    group = _row_of(slices.offsets[:, 0], part, at // GROUP, layout.head)
    return (group * LANES + lane) * GROUP + at % GROUP


def _row_of(tails: Tensor, part: Tensor, at: Tensor, head: int) -> Tensor:
    """Return which group (row of words) is the at-th of slice `part`, whose head has `head`."""
    return torch.where(at < head, part * head + at, tails.long()[part] + at - head)


def pack_deltas(
    sequence: Sequence, slices: Slices, where: tuple[Tensor, Tensor, Tensor], layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return deltas, int32 words, and starts, int16 [slices, 32]."""
    part, lane, at = where
    column = sequence.column
    delta = torch.zeros_like(column)
    delta[1:] = column[1:] - column[:-1]
    delta = torch.where(at == 0, 0, delta)
    starts = column.new_zeros(slices.order.shape[0], LANES)
    head = at == 0
    known = column * layout.classes + sequence.place % layout.classes
    starts[part[head], lane[head]] = known[head]
    # Fields do not overlap, so adding them is or-ing them; what passes 32 bits is the next word's.
    bit = at * layout.bits
    tails, rows = slices.offsets[:, 1], int(slices.offsets[-1, 1])
    words = column.new_zeros((rows + 1) * LANES)
    field = delta << bit % 32
    for low, value in ((0, field & 0xFFFFFFFF), (1, field >> 32)):
        row = _row_of(tails, part, bit // 32 + low, layout.head_words)
        words.index_add_(0, row.clamp(max=rows) * LANES + lane, value)
    return _to_int32(words[:-LANES]), starts.to(torch.int16)


def _to_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def slice_groups(offsets: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return, for every group of values, its slice and how many of its stream stand before it."""
    tails = offsets[:, 0].long()
    count, groups = tails.numel() - 1, int(tails[-1])
    group = torch.arange(groups, device=offsets.device)
    heads = count * layout.head
    tail = torch.repeat_interleave(tails.diff(), output_size=groups - heads)
    if layout.head == 0:
        return tail, group - tails[tail]
    part = torch.cat((group[:heads] // layout.head, tail))
    before = torch.cat((group[:heads] % layout.head, group[heads:] - tails[tail] + layout.head))
    return part, before


def unpack(
    deltas: Tensor, starts: Tensor, order: Tensor, offsets: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return row and column of every entry of values, filling included: int64 [groups * 256] each.

    Rows are -1 in the streams of no row.
    """
    device, tails = deltas.device, offsets[:, 1]
    part, before = slice_groups(offsets, layout)
    groups = part.numel()
    bit = (before[:, None] * GROUP + torch.arange(GROUP, device=device)) * layout.bits
    words = torch.cat((deltas, deltas.new_zeros(LANES))).long() & 0xFFFFFFFF
    words = words.reshape(-1, LANES)
    field = 0
    for low in (0, 1):
        row = _row_of(tails, part[:, None], bit // 32 + low, layout.head_words)
        # The low 8 bits of the next word are enough for what a field has there.
        field = (
            field | (words[row.clamp(max=words.shape[0] - 1)] & (0xFF if low else -1)) << 32 * low
        )
    delta = (field >> (bit % 32)[:, :, None]) & ((1 << layout.bits) - 1)  # [groups, 8, 32]
    # Sums run along all streams at once; what stood before a slice is then taken away. The first
    # delta of a stream is 0, so that is the sum at its first entry.
    in_order = torch.argsort(part, stable=True)
    along = torch.empty_like(delta)
    sums = delta[in_order].reshape(groups * GROUP, LANES).cumsum(0)
    along[in_order] = sums.reshape(groups, GROUP, LANES)
    first = torch.zeros(starts.shape[0], LANES, dtype=torch.int64, device=device)
    begins = before == 0
    first[part[begins]] = along[begins, 0]
    column = (along - first[part][:, None]) * layout.classes + starts.long()[part][:, None]
    column = column + (part // max(layout.slices, 1) * layout.part)[:, None, None]
    row = order.long()[part].repeat_interleave(layout.lanes, 1)[:, None].expand_as(column)
    return row.transpose(1, 2).reshape(-1), column.transpose(1, 2).reshape(-1)
